"""Starting several ranks in every way, losing one, going on with another number of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_recipe
from ranked import free_port, furthest, losses, rank_env, run_cases, trained

from llamaweft.pipeline import Pipeline
from llamaweft.recipe import Recipe
from llamaweft.train.events import StepEnded, StopRequest

LIMIT_SECONDS = 150
LOST_SECONDS = 30
"""Within which a run ends everywhere once a rank was killed."""


@pytest.fixture
def recipe(recipe_tree: dict, tmp_path: Path) -> Path:
    recipe_tree["training"] |= {"learning_rate": 1e-4, "memory_budget": "1GiB"}
    return write_recipe(recipe_tree, tmp_path / "recipe.yaml")


def environment(**more: str) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"} | more


def start(*command: object, env: dict[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr). Nothing of it is left running."""
    try:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def train(*arguments: object) -> tuple[int, str, str]:
    return end(start("llamaweft", "train", *arguments))


def alone(recipe: Path, folder: Path) -> Path:
    code, _, err = train(recipe, f"output_dir={folder}")
    assert code == 0, err
    return folder


def test_nproc_trains_what_one_process_trains(recipe: Path, tmp_path: Path) -> None:
    code, out, err = train(recipe, "parallel.data=2", "--nproc", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 6  # one document: the first rank's
    run, single = tmp_path / "run", alone(recipe, tmp_path / "alone")
    assert losses(run) == pytest.approx(losses(single), rel=1e-5)
    assert furthest(trained(run), trained(single))[0] < 1e-5
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [json.loads(line) for line in (single / "metrics.jsonl").read_text().splitlines()]
    for key in ("tokens", "computed_tokens", "trained_tokens"):  # global values
        assert [m.get(key) for m in metrics] == [m.get(key) for m in numbers]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_other_launchers_start_two_machines(launcher: str, recipe: Path, tmp_path: Path) -> None:
    """Two groups of processes on loopback that find each other by a rendezvous."""
    port, run = free_port(), tmp_path / "run"
    groups = []
    for node in range(2):
        if launcher == "torchrun":
            how = [
                "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend",
                "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "x", "--local-addr", "127.0.0.1",
            ]  # fmt: skip
        else:
            how = [
                "accelerate.commands.launch",  # --multi_gpu: several processes by torchrun
                *("--multi_gpu", "--num_processes", 2, "--num_machines", 2, "--machine_rank", node),
                *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
                *("--rdzv_backend", "static", "--mixed_precision", "no", "--dynamo_backend", "no"),
            ]
        groups.append(start(*how, "-m", "llamaweft", "train", recipe, "parallel.shard=2"))
    ends = [end(group) for group in groups]
    assert [code for code, _, _ in ends] == [0, 0], ends
    single = alone(recipe, tmp_path / "alone")
    assert losses(run) == pytest.approx(losses(single), rel=1e-5)
    assert furthest(trained(run), trained(single))[0] < 1e-5


def wait_for(path: Path) -> None:
    began = time.monotonic()
    while not path.exists():
        assert time.monotonic() - began < LIMIT_SECONDS
        time.sleep(0.05)


def ranks_of(port: int) -> dict[int, int]:
    """The processes that meet at a port, by their ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            env = dict(
                e.split("=", 1) for e in (folder / "environ").read_text().split("\0") if "=" in e
            )
        except (OSError, UnicodeDecodeError):
            continue
        if env.get("MASTER_PORT") == str(port) and "RANK" in env:
            found[int(env["RANK"])] = int(folder.name)
    return found


def test_a_killed_rank_ends_the_run_and_is_named_and_fewer_go_on(
    recipe: Path, tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    endless = (
        "training.max_steps=100000",
        "evaluation.every_steps=null",
        "training.checkpoint_every_steps=1",
    )
    ranks = [
        start("llamaweft", "train", recipe, "parallel.data=4", "training.gradient_accumulation_steps=4",
              *endless, env=environment() | rank_env(rank, 4, port))
        for rank in range(4)
    ]  # fmt: skip
    wait_for(run / "checkpoints" / "step-000003")
    ranks[2].kill()
    killed = time.monotonic()
    ends = [end(rank) for n, rank in enumerate(ranks) if n != 2]
    assert time.monotonic() - killed < LOST_SECONDS
    assert [code for code, _, _ in ends] == [1, 1, 1]
    said = "".join(err for _, _, err in ends)
    assert said.count("rank 2 no longer answers") == 1, said
    assert "--resume" in said
    end(ranks[2])


def test_nproc_names_the_rank_that_was_killed(recipe: Path, tmp_path: Path) -> None:
    endless = (
        "training.max_steps=100000",
        "evaluation.every_steps=null",
        "training.checkpoint_every_steps=1",
    )
    launched = start("llamaweft", "train", recipe, "parallel.data=2", "--nproc", 2, *endless)
    wait_for(tmp_path / "run" / "checkpoints" / "step-000003")
    children = [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if (folder / "stat").exists()
        and _parent(folder) == launched.pid
        and b"RANK=1\0" in (folder / "environ").read_bytes()
    ]
    os.kill(children[0], signal.SIGKILL)
    killed = time.monotonic()
    code, _, err = end(launched)
    assert time.monotonic() - killed < LOST_SECONDS
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "rank 1 was killed (SIGKILL)" in line


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_a_signal_saves_on_all_ranks(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    endless = (
        "training.max_steps=100000",
        "evaluation.every_steps=null",
        "training.checkpoint_every_steps=100000",
    )
    launched = start("llamaweft", "train", recipe, "parallel.data=2", "--nproc", 2, *endless)
    wait_for(run / "metrics.jsonl")
    time.sleep(1)
    launched.send_signal(signal.SIGTERM)
    code, _, err = end(launched)
    assert code == 143, err
    (saved,) = (run / "checkpoints").glob("step-*")
    assert "saved after step" in err
    assert int(saved.name.removeprefix("step-")) > 0


@pytest.mark.parametrize("method", ["lora", pytest.param("none", marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on(method: str, recipe_tree: dict, tmp_path: Path) -> None:
    """Stopped after two steps on four ranks, after two more on two, after two more on one, ended
    by four again: as eight steps of one process. (A stop is heard of in the step after it.)"""
    adapter = {"method": method} | ({"r": 4, "lora_alpha": 8} if method == "lora" else {})
    recipe_tree["adapter"] = adapter
    recipe_tree["training"] |= {
        "learning_rate": 1e-4,
        "adam_epsilon": 1e-6,
        "max_steps": 8,
        "gradient_accumulation_steps": 4,
        "checkpoint_every_steps": 100,
        "memory_budget": "4GiB",
    }
    if method == "none":
        del recipe_tree["base_weights"]
    single = recipe_tree | {"output_dir": str(tmp_path / "alone")}
    Pipeline(Recipe.validate_tree(single)).train()
    case = {"recipe": recipe_tree, "resume": True}
    for ranks, layout, step in ((4, {"shard": 4}, 2), (2, {"tensor": 2}, 4)):
        run_cases(ranks, [case | {"layout": layout, "stop_after": step - 1}], tmp_path)
        (saved,) = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1:]
        assert saved.name == f"step-{step:06d}"
        assert not list(saved.rglob("*.pt")) + list(saved.rglob("*.distcp"))  # no pickles
    stop = StopRequest()

    def stop_at_six(event: object) -> None:
        if isinstance(event, StepEnded) and event.step == 6:
            stop("SIGTERM")

    pipeline = Pipeline(Recipe.validate_tree(recipe_tree))
    pipeline.train(resume=True, listeners=[stop_at_six], stop=stop)
    run_cases(4, [case | {"layout": {"data": 2, "shard": 2}}], tmp_path)
    run = tmp_path / "run"
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert len(losses(run)) == 8
    assert furthest(trained(run), trained(tmp_path / "alone"))[0] < 1e-5


def test_torchrun_starts_again_from_the_last_checkpoint(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launched = start(
        "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1,
        "-m", "llamaweft", "train", recipe, "parallel.data=2", "training.checkpoint_every_steps=1",
        "training.max_steps=12", "evaluation.every_steps=null",
    )  # fmt: skip
    wait_for(run / "checkpoints" / "step-000002")
    workers = [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if (folder / "stat").exists() and _parent(folder) == launched.pid
    ]
    os.kill(workers[-1], signal.SIGKILL)
    code, _, err = end(launched)
    assert code == 0, err
    assert "resuming from step-" in err
    assert [
        r["step"]
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if r["kind"] == "train"
    ] == list(range(1, 13))


BAD = {
    "a mesh of another size": (["parallel.data=2", "parallel.tensor=2"], 2, "data 2 x shard 1 x tensor 2 is 4 processes, and 2 were started"),
    "heads that do not divide": (["parallel.tensor=4"], 4, "parallel.tensor: 4 does not divide the model's num_key_value_heads, 2"),
    "more ranks than packs of a step": (["parallel.data=3"], 3, "3 ranks have packs of their own, and a step has training.gradient_accumulation_steps: 2"),
    "more ranks than rows": (["parallel.data=4", "training.gradient_accumulation_steps=1", "training.max_steps=1"], 4, "4 ranks have packs of their own, and the run has 1"),
    "one step at a time": (["parallel.shard=2", "training.optimizer=adamw_8bit"], 2, "adamw_8bit"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_sentence(case: str, recipe: Path, tmp_path: Path) -> None:
    overrides, ranks, sentence = BAD[case]
    code, _, err = train(recipe, *overrides, "--nproc", ranks)
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert sentence in line
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_ranks_with_other_recipes_are_named(
    recipe: Path, recipe_tree: dict, tmp_path: Path
) -> None:
    port = free_port()
    seeds = ["training.seed=0", "training.seed=0", "training.seed=1"]
    ranks = [
        start("llamaweft", "train", recipe, "parallel.data=3", "training.gradient_accumulation_steps=3", seed,
              env=environment() | rank_env(rank, 3, port))
        for rank, seed in enumerate(seeds)
    ]  # fmt: skip
    ends = [end(rank) for rank in ranks]
    assert [code for code, _, _ in ends] == [2, 2, 2]
    said = "".join(err for _, _, err in ends)
    assert said.count("error:") == 1, said
    assert "the recipe must be the same on all ranks" in said
    assert "on ranks 0, 1" in said
    assert "on rank 2" in said


def test_a_rendezvous_that_nobody_joins_ends(recipe: Path) -> None:
    began = time.monotonic()
    code, _, err = end(
        start("llamaweft", "train", recipe, "parallel.data=2", "parallel.timeout_seconds=6",
              env=environment() | rank_env(0, 2, free_port()))
    )  # fmt: skip
    assert code == 2, err
    assert time.monotonic() - began < 60
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "not all 2 processes came" in line
