"""`llamaweft launch` writes jobs that their platforms' own schemas and readers take."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest
from conftest import write_recipe
from ruamel.yaml import YAML

from llamaweft.recipe import Recipe

ON = ("slurm", "kubernetes", "skypilot", "sagemaker", "docker")
SCRIPTS = {"slurm": ["job.sh", "setup.sh"], "docker": ["run.sh"]}
LAYOUTS = {
    "one device": ("t4", 1, 1, ON),
    "one machine": ("t4", 4, 1, ON),
    "two machines": ("h100", 8, 2, ("slurm", "kubernetes", "skypilot", "sagemaker")),
}
CASES = [(layout, on) for layout, (*_, platforms) in LAYOUTS.items() for on in platforms]


@pytest.fixture
def recipe(recipe_tree: dict, tmp_path: Path) -> Path:
    """The tiny recipe for a device that is not here, with packs for sixteen ranks."""
    recipe_tree["training"] |= {
        "device": "auto", "gradient_accumulation_steps": 16, "micro_batch_tokens": 64, "max_steps": 2,
    }  # fmt: skip
    recipe_tree["output_dir"] = "runs/tiny"
    return write_recipe(recipe_tree, tmp_path / "recipe.yaml")


@pytest.fixture
def written(command, recipe: Path, tmp_path: Path):
    """Writes the job of a case: its folder and what `--json` said."""

    def write(layout: str, on: str, *more: object) -> tuple[Path, dict]:
        device, devices, nodes, _ = LAYOUTS[layout]
        shared = ["output_dir=/shared/runs/tiny"] if nodes > 1 else []
        said = command(
            "launch", recipe, *shared, "--on", on, "--write", "job", "--device", device,
            "--devices", devices, "--nodes", nodes, "--json", *more,
        )  # fmt: skip
        return tmp_path / "job", json.loads(said)

    return write


@pytest.mark.parametrize(("layout", "on"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_the_folder_is_a_whole_job(
    written, recipe: Path, chats: Path, layout: str, on: str
) -> None:
    folder, said = written(layout, on)
    there = Recipe.load(folder / "recipe.yaml")
    assert (folder / there.data.train[0].path).read_bytes() == chats.read_bytes()
    assert (folder / there.model / "config.json").exists()
    assert str(recipe.parent) not in (folder / "recipe.yaml").read_text(encoding="utf-8")
    assert (folder / "llamaweft/__main__.py").exists()
    assert set(said["files"]) == {path.name for path in folder.iterdir() if path.is_file()}
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert plan == said["candidates"]
    device, devices, nodes, _ = LAYOUTS[layout]
    needs = said["needs"]
    assert (needs["device"], needs["devices"], needs["nodes"]) == (device, devices, nodes)
    assert needs["limit_seconds"] >= 1.5 * needs["seconds"] + 1800
    assert needs["peak_bytes"] <= needs["usable_bytes"]


@pytest.mark.parametrize(("layout", "on"), [(l, on) for l, on in CASES if on in SCRIPTS])
def test_shells_read_the_scripts(written, layout: str, on: str) -> None:
    folder, _ = written(layout, on)
    for name in SCRIPTS[on]:
        subprocess.run(["bash", "-n", folder / name], check=True)
        checked = subprocess.run(["shellcheck", folder / name], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_script_asks_for_what_the_plan_says(written, layout: str) -> None:
    folder, said = written(layout, "slurm")
    lines = (folder / "job.sh").read_text(encoding="utf-8").splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in lines
        if line.startswith("#SBATCH --") and "=" in line
    )
    needs = said["needs"]
    assert int(asked["nodes"]) == needs["nodes"]
    assert int(asked["gpus-per-node"]) == needs["devices"]
    assert int(asked["mem"].removesuffix("G")) * 2**30 >= needs["host_bytes"]
    days, clock = asked["time"].split("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    assert 86_400 * int(days) + 3600 * hours + 60 * minutes + seconds == needs["limit_seconds"]
    assert ("scontrol show hostnames" in "\n".join(lines)) == (needs["nodes"] > 1)
