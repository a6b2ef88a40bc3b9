"""`llamaweft launch` writes jobs that their platforms' own schemas, clients and shells take.

TrainJob: the models of kubeflow-trainer-api. SkyPilot: the JSON schemas inside its wheel. SageMaker:
the fields of its SDK's classes, read from their source, and the service's model in botocore. Scripts:
bash and shellcheck. Dockerfile: hadolint. Slurm has no such package: its options are compared with
the plan.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import kubeflow_trainer_api.models as kubeflow
import pytest
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
from conftest import SIX_SHORT_STEPS, write_recipe
from ruamel.yaml import YAML
from said import all_said

from llamaweft.jobs.sagemaker import INSTANCES
from llamaweft.recipe import Recipe

BIN = Path(sys.executable).parent
ON = ("slurm", "kubernetes", "skypilot", "sagemaker", "docker")
LAYOUTS = {
    "one-device": ("t4", 1, 1, ON),
    "one-machine": ("t4", 4, 1, ("slurm", "kubernetes", "docker")),
    "two-machines": ("h100", 8, 2, ("slurm", "kubernetes", "skypilot", "sagemaker")),
}
CASES = [(layout, on) for layout, (*_, platforms) in LAYOUTS.items() for on in platforms]


def cases(*platforms: str) -> Any:
    """Those of these platforms."""
    return pytest.mark.parametrize(
        ("layout", "on"), [case for case in CASES if case[1] in platforms]
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A tiny model for a device that is not here, with packs for sixteen ranks."""
    folder = tmp_path_factory.mktemp("launch")
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"{2 * i}"} for i in range(60)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tree = {
        "model": str(tiny_folder),
        "data": {"train": str(folder / "chats.jsonl"), "validation": {"fraction": 0.2}},
        "adapter": {"r": 4},
        "base_weights": "fp32",
        "training": SIX_SHORT_STEPS
        | {"max_steps": 2, "gradient_accumulation_steps": 16, "micro_batch_tokens": 64},
        "evaluation": {"metrics": ["loss"]},
        "output_dir": "runs/tiny",
    }
    return write_recipe(tree, folder / "recipe.yaml")


@pytest.fixture
def launch(recipe: Path, monkeypatch, capsys):
    """Runs the verb: its exit code and all that it says."""

    def call(*arguments: object) -> tuple[int, str]:
        return all_said(monkeypatch, capsys, "launch", recipe, *arguments)

    return call


@pytest.fixture
def written(launch, recipe: Path):
    """The folder of a case, and the document that `--json` said; each is written once."""

    def write(layout: str, on: str) -> tuple[Path, dict]:
        folder = recipe.parent / f"{layout}-{on}"
        document = folder.with_suffix(".json")
        if not folder.exists():
            device, devices, nodes, _ = LAYOUTS[layout]
            shared = ["output_dir=/shared/runs/tiny"] if nodes > 1 else []
            code, said = launch(
                *shared, "--on", on, "--write", folder, "--device", device,
                "--devices", devices, "--nodes", nodes, "--json",
            )  # fmt: skip
            assert code == 0, said
            document.write_text(said[said.index("{") : said.rindex("}") + 1], encoding="utf-8")
        return folder, json.loads(document.read_text(encoding="utf-8"))

    return write


def yaml_in(path: Path) -> list[Any]:
    return list(YAML(typ="safe", pure=True).load_all(path.read_text(encoding="utf-8")))


@cases(*ON)
def test_the_folder_is_a_whole_job(written, recipe: Path, layout: str, on: str) -> None:
    folder, said = written(layout, on)
    there = Recipe.load(folder / "recipe.yaml")
    copied = folder / there.data.train[0].path
    assert copied.read_bytes() == (recipe.parent / "chats.jsonl").read_bytes()
    assert (folder / there.model / "config.json").exists()
    for path in folder.iterdir():
        if path.is_file():
            assert str(recipe.parent) not in path.read_text(encoding="utf-8"), path
    assert set(said["files"]) == {path.name for path in folder.iterdir() if path.is_file()}
    assert json.loads((folder / "plan.json").read_text(encoding="utf-8")) == said["candidates"]
    device, devices, nodes, _ = LAYOUTS[layout]
    needs = said["needs"]
    assert (needs["device"], needs["devices"], needs["nodes"]) == (device, devices, nodes)
    assert needs["limit_seconds"] >= 1.5 * needs["seconds"] + 1800
    assert 0 < needs["peak_bytes"] <= needs["usable_bytes"]
    assert needs["layout"] == ("one process" if nodes * devices == 1 else f"data {nodes * devices}")


@cases("slurm", "docker")
def test_shells_read_the_scripts(written, layout: str, on: str) -> None:
    folder, _ = written(layout, on)
    scripts = sorted(folder.glob("*.sh"))
    assert [path.name for path in scripts] == (
        ["job.sh", "setup.sh"] if on == "slurm" else ["run.sh"]
    )
    for path in scripts:
        subprocess.run(["bash", "-n", path], check=True)
        checked = subprocess.run([BIN / "shellcheck", path], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_script_asks_for_what_the_plan_says(written, layout: str) -> None:
    folder, said = written(layout, "slurm")
    text = (folder / "job.sh").read_text(encoding="utf-8")
    options = [
        line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")
    ]
    asked = dict(option.split("=", 1) for option in options if "=" in option)
    needs = said["needs"]
    assert int(asked["nodes"]) == needs["nodes"]
    assert int(asked["gpus-per-node"]) == needs["devices"]
    assert 0 <= int(asked["mem"].removesuffix("G")) * 2**30 - needs["host_bytes"] < 2**30
    days, clock = asked["time"].split("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    assert 86_400 * int(days) + 3600 * hours + 60 * minutes + seconds == needs["limit_seconds"]
    assert ("scontrol show hostnames" in text) == (needs["nodes"] > 1)


@cases("kubernetes")
def test_kubeflow_takes_the_trainjob(written, layout: str, on: str) -> None:
    """Its own models read it, and give back every key: one that they do not know would be lost."""
    folder, said = written(layout, on)
    claim, job = yaml_in(folder / "trainjob.yaml")
    assert kubeflow.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    assert kubeflow.IoK8sApiCoreV1PersistentVolumeClaim.from_dict(claim).to_dict() == claim
    needs, trainer = said["needs"], job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (needs["nodes"], needs["devices"])
    limits = trainer["resourcesPerNode"]["limits"]
    assert limits["nvidia.com/gpu"] == needs["devices"]
    assert int(limits["memory"].removesuffix("Gi")) * 2**30 >= needs["host_bytes"]
    assert job["spec"]["activeDeadlineSeconds"] == needs["limit_seconds"]
    subprocess.run(["bash", "-n", "-c", trainer["args"][0]], check=True)


@cache
def skypilot_schemas() -> tuple[dict, dict]:
    """Those of a task and of its resources. The wheel is installed without its sixty dependencies, so
    the two modules that would import them are put in: the names of modes that `autostop.wait_for`
    takes, and of daemons of its server, of neither of which a job says anything."""
    (root,) = importlib.util.find_spec("sky").submodule_search_locations
    version = importlib.metadata.version("skypilot")
    put = {
        name: ModuleType(name) for name in ("sky", "sky.skylet.autostop_lib", "sky.server.daemons")
    }
    put["sky"].__dict__.update(__path__=[root], __version__=version, __commit__="")
    modes = type("AutostopWaitFor", (), {"supported_modes": staticmethod(lambda: ["none"])})
    put["sky.skylet.autostop_lib"].__dict__["AutostopWaitFor"] = modes
    put["sky.server.daemons"].__dict__["INTERNAL_REQUEST_DAEMONS"] = []
    sys.modules.update(put)
    try:
        schemas = importlib.import_module("sky.utils.schemas")
        return schemas.get_task_schema(), schemas.get_resources_schema()
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sky"]:
            del sys.modules[name]


@cases("skypilot")
def test_skypilot_takes_the_task(written, layout: str, on: str) -> None:
    folder, said = written(layout, on)
    (task,) = yaml_in(folder / "job.yaml")
    of_task, of_resources = skypilot_schemas()
    jsonschema.validate(task, of_task)
    jsonschema.validate(task["resources"], of_resources)
    for candidate in task["resources"]["any_of"]:
        jsonschema.validate(candidate, of_resources)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task["resources"] | {"disk_sise": 1}, of_resources)
    needs = said["needs"]
    assert task["num_nodes"] == needs["nodes"]
    (candidate,) = task["resources"]["any_of"]
    assert candidate["accelerators"] == f"{needs['device'].upper()}:{needs['devices']}"
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)


def test_skypilot_chooses_among_priced_devices(launch, recipe: Path, tmp_path: Path) -> None:
    """Each that fits is a candidate, with its seconds and cost; one that does not is named."""
    budget = "training.memory_budget=30GiB"  # more than an L4 has
    code, said = launch(
        budget, "--on", "skypilot", "--write", tmp_path / "job", "--device", "h100",
        "--price", "h100=2.99", "--price", "A100=1.5", "--price", "l40s=0.01", "--price", "l4=0.7", "--json",
    )  # fmt: skip
    assert code == 0, said
    content = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert [needs["device"] for needs in content["candidates"]] == ["h100", "l40s", "a100"]
    for needs in content["candidates"]:
        assert needs["cost"] == pytest.approx(needs["seconds"] / 3600 * needs["price"])
    h100, l40s, a100 = content["candidates"]
    assert h100["seconds"] < a100["seconds"]
    assert l40s["cost"] < a100["cost"]  # the cheapest of the others comes first
    assert content["unfit"].keys() == {"l4"}
    text = (tmp_path / "job/job.yaml").read_text(encoding="utf-8")
    (task,) = yaml_in(tmp_path / "job/job.yaml")
    assert [c["accelerators"] for c in task["resources"]["any_of"]] == [
        "H100:1",
        "L40S:1",
        "A100-80GB:1",
    ]
    assert "# not l4: training.memory_budget: 30.0 GiB is more than" in text


@cache
def sagemaker_fields() -> dict[str, set[str]]:
    """Fields of the SDK's classes, with those of the classes they are made from."""
    packages = Path(importlib.util.find_spec("sagemaker").submodule_search_locations[0])
    found: dict[str, tuple[set[str], list[str]]] = {}
    for name in ("core/shapes/shapes.py", "core/training/configs.py", "train/model_trainer.py"):
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # its escapes
            tree = ast.parse((packages / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                fields = {a.target.id for a in node.body if isinstance(a, ast.AnnAssign)}
                bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
                before = found.get(node.name, (set(), []))
                found[node.name] = (fields | before[0], [*bases, *before[1]])

    def fields_of(name: str, seen: tuple[str, ...] = ()) -> set[str]:
        if name not in found or name in seen:
            return set()
        fields, bases = found[name]
        return fields.union(*(fields_of(base, (*seen, name)) for base in [*bases, name]))

    return {name: fields_of(name) for name in found}


@cases("sagemaker")
def test_sagemaker_takes_the_job(written, layout: str, on: str) -> None:
    """Each class is called by fields that it has, and the service's own model takes the values."""
    folder, said = written(layout, on)
    tree = ast.parse((folder / "sagemaker_job.py").read_text(encoding="utf-8"))
    calls = {
        node.func.id: {word.arg: word.value for word in node.keywords}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.keywords
    }
    assert calls.keys() == {
        "ModelTrainer",
        "SourceCode",
        "Compute",
        "StoppingCondition",
        "CheckpointConfig",
    }
    for name, words in calls.items():
        assert words.keys() <= sagemaker_fields()[name], name
    compute = {name: ast.literal_eval(value) for name, value in calls["Compute"].items()}
    service = ServiceModel(Loader().load_service_model("sagemaker", "service-2"))
    request = {
        "TrainingJobName": "llamaweft-tiny-1",
        "AlgorithmSpecification": {"TrainingImage": "image", "TrainingInputMode": "File"},
        "RoleArn": "arn:aws:iam::123456789012:role/training",
        "OutputDataConfig": {"S3OutputPath": "s3://bucket/x"},
        "ResourceConfig": {
            "InstanceType": compute["instance_type"],
            "InstanceCount": compute["instance_count"],
            "VolumeSizeInGB": compute["volume_size_in_gb"],
        },
        "StoppingCondition": {
            "MaxRuntimeInSeconds": ast.literal_eval(
                calls["StoppingCondition"]["max_runtime_in_seconds"]
            )
        },
    }
    shape = service.operation_model("CreateTrainingJob").input_shape
    report = ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()
    needs = said["needs"]
    assert request["StoppingCondition"]["MaxRuntimeInSeconds"] == needs["limit_seconds"]
    assert compute["instance_count"] == needs["nodes"]
    assert compute["volume_size_in_gb"] * 2**30 >= needs["disk_bytes"]
    command = ast.literal_eval(
        next(
            n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "COMMAND"
        )
    )
    subprocess.run(["bash", "-n", "-c", command], check=True)


def test_sagemaker_has_every_instance() -> None:
    service = ServiceModel(Loader().load_service_model("sagemaker", "service-2"))
    there = service.shape_for("TrainingInstanceType").enum
    named = {instance.name for instances in INSTANCES.values() for instance in instances}
    assert named <= set(there)


@cases("docker", "kubernetes", "sagemaker")
def test_hadolint_takes_the_dockerfile(written, layout: str, on: str) -> None:
    folder, _ = written(layout, on)
    checked = subprocess.run(
        [BIN / "hadolint", folder / "Dockerfile"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    text = (folder / "Dockerfile").read_text(encoding="utf-8")
    assert ("\nCMD " in text) == (on == "docker")
    for name in ("requirements.txt", ".dockerignore"):
        assert (folder / name).exists()


def test_the_command_of_the_image_trains(written, tmp_path: Path) -> None:
    """What the Dockerfile starts, started in the folder that it copies: code, recipe and data of the
    job and nothing else; and once more, when it finds the run finished."""
    folder, _ = written("one-device", "docker")
    (line,) = [
        n
        for n in (folder / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if n.startswith("CMD ")
    ]
    command = json.loads(line.removeprefix("CMD "))
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        lines = (folder / "runs/tiny/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(row)["step"] for row in lines if '"train"' in row] == [1, 2]
    where = [sys.executable, "-c", "import llamaweft; print(llamaweft.__file__)"]
    said = subprocess.run(where, cwd=folder, env=env, capture_output=True, text=True, check=True)
    assert Path(said.stdout.strip()) == folder / "llamaweft/__init__.py"


MISTAKES = {
    "an unknown device": (["--device", "abacus"], "--device abacus: unknown"),
    "what does not fit": (
        ["--device", "t4", "training.memory_budget=1MiB"],
        "the smallest that works is",
    ),
    "a budget that the device has not": (
        ["--device", "t4", "training.memory_budget=40GiB"],
        "training.memory_budget: 40.0 GiB is more than the 13.9 GiB of NVIDIA T4",
    ),
    "a CPU's recipe": (
        ["--device", "t4", "training.device=cpu"],
        "training.device: cpu, and the job",
    ),
    "another number of ranks": (
        ["--device", "t4", "--devices", "4", "parallel={data: 2}"],
        "is 2 ranks",
    ),
    "ranks for one device": (["--device", "t4", "parallel={data: 2}"], "is 2 ranks"),
    "more ranks than packs": (
        ["--device", "t4", "--devices", "128"],
        "128 ranks have packs of their own",
    ),
    "no price": (["--device", "t4", "--price", "t4"], "--price t4: write it as DEVICE=PRICE"),
    "a price below nothing": (["--device", "t4", "--price", "t4=-1"], "--price t4=-1: give what"),
    "a price that no table shows": (
        ["--device", "t4", "--price", "l4=1"],
        "--price l4=1: a job --on slurm",
    ),
    "an image for Slurm": (
        ["--device", "t4", "--image", "x"],
        "--image x: a job --on slurm takes none",
    ),
    "no run folder of the job": (["--device", "t4", "output_dir=x"], "output_dir: x is to be"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(launch, tmp_path: Path, mistake: str) -> None:
    arguments, sentence = MISTAKES[mistake]
    code, said = launch("--on", "slurm", "--write", tmp_path / "job", *arguments)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), said
    assert sentence in errors[0]
    assert not (tmp_path / "job").exists()


def test_a_folder_that_holds_something_is_refused(launch, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    code, said = launch("--on", "slurm", "--write", tmp_path, "--device", "t4")
    assert code == 2
    assert f"error: {tmp_path} exists and is not empty" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
