"""`llamaweft verify resume`: a run that is killed and resumed is one that never was, proven by real
processes; and what would be seen if it were not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file, save_file
from test_tasks import write_task

from llamaweft.recipe import Recipe
from llamaweft.train.run_folder import read_json
from llamaweft.verify import resume
from llamaweft.verify.compare import compare_runs
from llamaweft.verify.part import Part, order_file
from llamaweft.verify.resume import cases, starts


def proven(command, *arguments: object) -> dict:
    content = json.loads(command("verify", "resume", "recipe.yaml", *arguments, "--json"))
    assert content["passed"]
    assert content["folder"] is None
    return content


def leaves_nothing(folder: Path, before: set[Path]) -> bool:
    return {*folder.iterdir()} == before


def test_an_adapter_with_dropout_is_proven_in_every_case(
    recipe_tree: dict, tmp_path: Path, command
) -> None:
    """Two packs a step; the recipe is shorter than the proof."""
    recipe_tree["adapter"]["lora_dropout"] = 0.1
    recipe_tree["training"] |= {"max_steps": 2, "micro_batch_tokens": 128}
    write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    before = {*tmp_path.iterdir()}
    content = proven(command, "--steps", 1)
    assert leaves_nothing(tmp_path, before)
    between, midst, after = content["cases"]
    assert [case["steps"] for case in content["cases"]] == [2, 2, 2]
    assert [case["packs"] for case in content["cases"]] == [4, 4, 4]
    assert between["start_step"] == midst["start_step"] < after["start_step"]
    assert "SIGTERM in pack 1 of 2" in midst["interrupted"]
    assert "SIGKILL in pack 2 of 2" in after["interrupted"]
    assert between["tensors"] > 3 * 14  # weights and two moments of each adapted matrix


def test_the_table_fits_a_terminal_and_says_what_does_not_apply(
    recipe_tree: dict, tmp_path: Path, command
) -> None:
    recipe_tree["training"] |= {"gradient_accumulation_steps": 1}
    recipe_tree |= {"forgetting": {"prompts": 5, "answers": 0}, "guard": {"then": "stop"}}
    write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    said = command("verify", "resume", "recipe.yaml", "--steps", "1")
    assert said.count("identical") == 2
    assert "not applicable" in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"method": "none"}},
        {"adapter": {"r": 4}, "data": {"validation": None}, "evaluation": {}},
    ],
)
def test_every_weight_and_nothing_held_out_are_proven(
    recipe_tree: dict, tmp_path: Path, command, changes: dict
) -> None:
    changes["data"] = recipe_tree["data"] | changes.get("data", {})
    write_recipe(recipe_tree | changes, tmp_path / "recipe.yaml")
    assert len(proven(command)["cases"]) == 3


@pytest.mark.slow
def test_a_classification_is_proven(tiny_folder: Path, tmp_path: Path, command) -> None:
    write_task(tmp_path, tiny_folder, "sequence_classification")
    assert len(proven(command)["cases"]) == 3


@pytest.mark.slow
def test_a_sweep_is_proven(recipe_tree: dict, tmp_path: Path, command) -> None:
    recipe_tree["adapter"]["lora_dropout"] = 0.1
    write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    before = {*tmp_path.iterdir()}
    content = proven(command, "adapter.r=2,4", "--sweep")
    assert leaves_nothing(tmp_path, before)
    assert [case["case"] for case in content["cases"]] == ["01-r=2", "02-r=4"]
    assert [case["steps"] for case in content["cases"]] == [4, 4]
    refused = command(
        *("verify", "resume", "recipe.yaml", "--sweep", "training.max_steps=4,8"), code=2
    )
    assert "training.max_steps" in refused


def test_a_recipe_that_is_wrong_is_refused_before_any_process(
    recipe_tree: dict, tmp_path: Path, command, monkeypatch
) -> None:
    monkeypatch.setattr(resume, "_process", lambda task: pytest.fail("a process was started"))
    recipe_tree["data"] = {"train": str(tmp_path / "missing.jsonl")}
    write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    assert "missing.jsonl" in command("verify", "resume", "recipe.yaml", code=2)


def test_a_difference_ends_with_1_and_keeps_both_runs(
    recipe_tree: dict, tmp_path: Path, command, monkeypatch
) -> None:
    """As if a run had forgotten to put its random numbers back."""

    def compare(whole: Path, resumed: Path, *rest):
        newest = sorted((resumed / "checkpoints").iterdir())[-1]
        random = load_file(newest / "rng.safetensors")
        random["torch"][100] ^= 1
        save_file(random, newest / "rng.safetensors")
        return compare_runs(whole, resumed, *rest)

    monkeypatch.setattr(resume, "compare_runs", compare)
    monkeypatch.setattr(resume, "cases", lambda *numbers: cases(*numbers)[:1])
    write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    said = command("verify", "resume", "recipe.yaml", "--steps", "1", code=1)
    assert "rng.safetensors: torch differs in 1 of" in said
    (kept,) = tmp_path.glob("run.verify-*")
    assert kept.name in said
    assert {"whole-from-0", "resumed-1"} <= {path.name for path in kept.iterdir()}


def test_a_run_that_was_not_interrupted_proves_nothing(
    recipe_tree: dict, tmp_path: Path, command, monkeypatch
) -> None:
    real = resume._process
    monkeypatch.setattr(
        resume, "_process", lambda task: (0, "verified") if task.cut else real(task)
    )
    write_recipe(recipe_tree, tmp_path / "recipe.yaml")
    said = command("verify", "resume", "recipe.yaml", "--steps", "1", code=1)
    assert "could not interrupt" in said
    assert not list(tmp_path.glob("run.verify-*"))


# --- what is compared ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and the order of its packs."""
    folder = tmp_path_factory.mktemp("whole")
    write_task(folder, tiny_folder, "sequence_classification", max_steps=2)
    tree = json.loads((folder / "recipe.yaml").read_text())
    tree |= {"output_dir": str(folder / "run")}
    tree["data"]["train"] = str(folder / "rows.jsonl")
    Part(Recipe.validate_tree(tree)).train()
    return folder / "run"


@pytest.fixture
def other(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "other")
    shutil.copy(order_file(whole), order_file(tmp_path / "other"))
    return tmp_path / "other"


def test_a_run_equals_its_copy(whole: Path, other: Path) -> None:
    comparison = compare_runs(whole, other, 0)
    assert not comparison.differences
    assert (comparison.steps, comparison.packs) == (2, 4)
    assert compare_runs(whole, other, 1).steps == 1


@pytest.mark.parametrize(
    ("file", "tensor"),
    [("trained", "lora_B"), ("optimizer", ":exp_avg_sq"), ("rng", "torch")],
)
def test_one_bit_of_one_number_is_seen(whole: Path, other: Path, file: str, tensor: str) -> None:
    path = other / f"checkpoints/step-000002/{file}.safetensors"
    tensors = load_file(path)
    name = max(name for name in tensors if tensor in name)
    tensors[name].reshape(-1).view(torch.uint8)[-8] ^= 1
    save_file(tensors, path)
    (said,) = compare_runs(whole, other, 0).differences
    assert f"{file}.safetensors: {name} differs in 1 of" in said


def test_a_zero_of_another_sign_and_what_is_no_number_are_told_apart(tmp_path: Path) -> None:
    from llamaweft.verify.compare import _differing

    nan = torch.tensor([float("nan")])
    assert _differing(nan, nan.clone()) == (0, 1)
    assert _differing(torch.tensor([0.0]), torch.tensor([-0.0])) == (1, 1)


def test_a_missing_tensor_and_another_state_are_named(whole: Path, other: Path) -> None:
    path = other / "checkpoints/step-000002/optimizer.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, path)
    state = read_json(path.with_name("state.json"))
    state["guard"]["losses"] += 1
    path.with_name("state.json").write_text(json.dumps(state))
    lacks, guard = compare_runs(whole, other, 0).differences
    assert f"{name} is in one of the runs only" in lacks
    assert guard.startswith("state.json: guard is")


def test_another_loss_is_named_with_its_step(whole: Path, other: Path) -> None:
    path = other / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["loss"] += 1e-15
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (said,) = compare_runs(whole, other, 0).differences
    assert said.startswith("step 2: loss is")
    path.write_text(json.dumps(lines[0]) + "\n")
    (said,) = compare_runs(whole, other, 0).differences
    assert "its lines are of steps 1 2, resumed: 1" in said


def test_the_order_of_rows_is_held_against_what_was_computed_last(whole: Path, other: Path) -> None:
    order = order_file(other)
    lines = [json.loads(line) for line in order.read_text().splitlines()]

    def differences(changed: list[dict]) -> list[str]:
        order.write_text("".join(json.dumps(line) + "\n" for line in changed))
        return compare_runs(whole, other, 0).differences

    again = [line | {"process": 0} for line in lines[2:]]
    assert not differences([*lines[:3], *again])  # killed in the second step, and resumed
    others = lines[2] | {"rows": lines[0]["rows"]}
    assert differences([*lines[:2], others, *again]) == [
        "step 2, pack 1: other rows were computed the second time"
    ]
    assert differences([*lines[:2], others, lines[3]]) == [
        "step 2, pack 1: other rows were computed"
    ]
    assert differences(lines[:3]) == ["step 2, pack 2 was not computed by the resumed run"]
    more = lines[0] | {"step": 3}
    assert differences([*lines, more]) == ["step 3, pack 1 was computed by the resumed run only"]


def test_rows_that_are_not_those_of_their_place_are_named(whole: Path, other: Path) -> None:
    """Both runs may have begun at a wrong place."""
    lines = [json.loads(line) for line in order_file(whole).read_text().splitlines()]
    expected = {(line["step"], line["pack"]): line["rows"] for line in lines}
    assert not compare_runs(whole, other, 0, expected).differences
    expected[2, 0] = expected[1, 0]
    (said,) = compare_runs(whole, other, 0, expected).differences
    assert said == "step 2, pack 1 has not the rows of that place in the data"


def test_another_checkpoint_or_evaluation_is_named(whole: Path, other: Path) -> None:
    (other / "evaluation.json").write_text("{}")
    assert compare_runs(whole, other, 0).differences == ["evaluation.json differs"]
    shutil.rmtree(other / "checkpoints/step-000002")
    first, _ = compare_runs(whole, other, 0).differences
    assert "step-000002, resumed: none" in first


# --- where runs are interrupted -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("packs", "accumulation", "steps", "expected"),
    [(100, 4, 2, (10, 23)), (8, 4, 2, (0, 0)), (9, 4, 2, (0, 1)), (1, 4, 2, (0, 0))],
)
def test_where_the_steps_of_a_proof_begin(
    packs: int, accumulation: int, steps: int, expected: tuple[int, int]
) -> None:
    within, across = starts(packs, accumulation, steps)
    assert (within, across) == expected
    if packs == 100:
        assert (within + 2 * steps) * accumulation <= packs
        assert across * accumulation < packs <= (across + steps) * accumulation


def test_a_short_epoch_is_said_to_be_crossed() -> None:
    between, midst, _ = cases(9, 4, 2)
    assert between.name == "between steps, across epochs (9 packs each)"
    assert midst.saved == "step-000002-pack-002"
    assert cases(100, 1, 2)[1].cut is None
