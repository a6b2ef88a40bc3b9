"""What is forgotten, from the command line: measured, bounded, resumed, and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file

from llamaweft import planning
from llamaweft.plan.time import Speed
from llamaweft.recipe import Recipe

QUICK = {"prompts": 5, "answers": 2, "max_new_tokens": 3}
STRONG = {"learning_rate": 3e-2, "lr_scheduler_type": "constant", "warmup_ratio": 0}


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch) -> None:
    """Nothing here depends on how fast this machine is, and finding it out takes a while."""
    speed = Speed(1e9, 1e9, 1e9, 0.01, "assumed", measured=False)
    monkeypatch.setattr(planning, "speed_of", lambda pieces, tokens: speed)


def tree_of(recipe_tree: dict, folder: Path, *, guard: dict | None = None, **changes) -> dict:
    """Four steps that forget more and more, validated each."""
    tree = recipe_tree | {"forgetting": QUICK | (guard or {}), "output_dir": "run"}
    tree["training"] = tree["training"] | STRONG | {"max_steps": 4}
    tree["evaluation"] = {"every_steps": 1, "metrics": ["loss"]}
    for section, content in changes.items():
        tree[section] = tree[section] | content if isinstance(content, dict) else content
    write_recipe(tree, folder / "recipe.yaml")
    return tree


def validated(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == "validation"]


def evaluation_of(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def is_untouched(run: Path) -> bool:
    state = load_file(run / "adapter/adapter_model.safetensors")
    return not any(t.any() for name, t in state.items() if "lora_B" in name)


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


def budget_between(run: Path, step: int) -> float:
    """A KL that step `step` of a run keeps, and the next one does not."""
    kept, over = (record["forgetting_kl"] for record in validated(run)[step - 1 : step + 1])
    assert kept < over
    return (kept + over) / 2


def test_what_is_measured_is_told_everywhere(recipe_tree, tmp_path, command) -> None:
    tree_of(recipe_tree, tmp_path)
    said = command("train", "recipe.yaml")
    assert "Forgetting, on 5 general prompts" in said
    run = tmp_path / "run"
    records = validated(run)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(0 < record["forgetting_kl"] < 1 for record in records)
    lines = [json.loads(x) for x in (run / "general_answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    content = evaluation_of(run)
    assert lines[3]["answers"] == content["forgetting"]["examples"]
    assert lines[0]["answers"] != lines[3]["answers"]
    assert [a["before"] for a in lines[0]["answers"]] == [a["before"] for a in lines[3]["answers"]]
    forgetting, best = content["forgetting"], records[3]
    assert set(content["before"]["metrics"]) == {"loss"}  # general prompts are no held-out rows
    assert forgetting["step"] == 4
    assert forgetting["stopped_at_step"] is None
    assert forgetting["kl"]["value"] == best["forgetting_kl"]
    assert forgetting["loss"]["after"]["value"] == best["forgetting_loss"]
    change = best["forgetting_loss"] - forgetting["loss"]["before"]["value"]
    assert forgetting["loss"]["difference"]["value"] == pytest.approx(change)
    assert len(forgetting["examples"]) == 2
    assert list(forgetting["areas"]) == ["facts", "reasoning", "code", "languages", "safety"]
    page, text = ((run / name).read_text() for name in ("report.html", "report.md"))
    for report in (page, text):
        assert "5 general prompts" in report
        assert forgetting["examples"][1]["prompt"][:20] in report
        assert "Forgetting: KL, nats per token" in report
    assert '<section id="forgetting"' in page
    plan = json.loads((run / "plan.json").read_text())
    kept = load_file(run / "forgetting.safetensors")["hidden_NE"]
    assert plan["parts"]["forgetting"] == kept.nbytes
    assert len(kept) == forgetting["tokens"]


def test_a_run_over_its_budget_stops_and_hands_out_what_kept_it(
    recipe_tree, tmp_path, command
) -> None:
    tree_of(recipe_tree, tmp_path, output_dir="free")
    command("train", "recipe.yaml")
    budget = budget_between(tmp_path / "free", 2)
    tree_of(recipe_tree, tmp_path, guard={"max_kl": budget})
    result = json.loads(command("train", "recipe.yaml", "--json"))
    assert (result["reason"], result["step"]) == ("forgetting", 3)
    run = tmp_path / "run"
    assert [r["step"] for r in validated(run)] == [1, 2, 3]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())][-1] == "step-000003"
    forgetting = evaluation_of(run)["forgetting"]
    assert (forgetting["step"], forgetting["stopped_at_step"]) == (2, 3)
    assert forgetting["kl"]["value"] == validated(run)[1]["forgetting_kl"] <= budget
    assert not is_untouched(run)
    again = json.loads(command("evaluate", "run", "--json"))["before"]["metrics"]["loss"]
    assert again["value"] == pytest.approx(validated(run)[1]["loss"], rel=1e-6)
    for name in ("report.html", "report.md"):
        assert "was ended at step 3" in (run / name).read_text()
    before = adapter_of(run)
    result = json.loads(command("train", "recipe.yaml", "--resume", "--json"))
    assert (result["reason"], result["step"]) == ("forgetting", 3)  # it stays so
    assert evaluation_of(run)["forgetting"] == forgetting
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_of(run).items())


def test_a_run_that_chooses_goes_on_and_keeps_what_is_within(
    recipe_tree, tmp_path, command
) -> None:
    answers = {"answers": 5, "max_new_tokens": 8}
    tree_of(recipe_tree, tmp_path, guard=answers, output_dir="free")
    command("train", "recipe.yaml")
    free = validated(tmp_path / "free")
    assert free[3]["loss"] < free[1]["loss"]  # so the budget alone decides
    budget = budget_between(tmp_path / "free", 2)
    tree_of(recipe_tree, tmp_path, guard=answers | {"max_kl": budget, "when_exceeded": "choose"})
    result = json.loads(command("train", "recipe.yaml", "--json"))
    assert (result["reason"], result["step"]) == ("finished", 4)
    run = tmp_path / "run"
    assert validated(run) == free  # measuring changes no step
    assert evaluation_of(run)["forgetting"]["step"] == 2
    again = json.loads(command("evaluate", "run", "--json"))["before"]["metrics"]["loss"]
    assert again["value"] == pytest.approx(free[1]["loss"], rel=1e-6)
    assert "kept by the weights of step 2" in (run / "report.md").read_text()
    last, kept = (
        [e["after"] for e in evaluation_of(r)["forgetting"]["examples"]]
        for r in (tmp_path / "free", run)
    )
    assert last != kept  # the answers are those of what was kept


@pytest.mark.parametrize("what", ["stop", "choose"])
def test_where_nothing_keeps_the_budget_nothing_learnt_is_handed_out(
    recipe_tree, tmp_path, command, what
) -> None:
    tree_of(recipe_tree, tmp_path, guard={"max_kl": 1e-9, "when_exceeded": what})
    result = json.loads(command("train", "recipe.yaml", "--json"))
    assert (result["reason"], result["step"]) == {
        "stop": ("forgetting", 1),
        "choose": ("finished", 4),
    }[what]
    run = tmp_path / "run"
    assert is_untouched(run)
    content = evaluation_of(run)
    assert content["forgetting"]["step"] == 0
    assert content["forgetting"]["kl"]["value"] == 0
    assert content["after"] == content["before"]
    assert all(e["before"] == e["after"] for e in content["forgetting"]["examples"])
    for name in ("report.html", "report.md"):
        said = (run / name).read_text()
        assert "no evaluation kept within" in said
        assert "holds the model as the run began" in said


def test_every_weight_trained_and_nothing_held_out(recipe_tree, tmp_path, command) -> None:
    """The guard works by itself, and the head is compared with what it was."""
    changes = {"data": {"validation": None}, "evaluation": None, "adapter": None}
    slow = {"training": {"learning_rate": 1e-3, "max_steps": 3}}

    def write(guard: dict | None, output: str) -> None:
        tree = tree_of(recipe_tree, tmp_path, guard=guard, output_dir=output, **changes, **slow)
        tree["adapter"], tree["evaluation"] = {"method": "none"}, {"every_steps": 1}
        write_recipe(tree, tmp_path / "recipe.yaml")

    write(None, "free")
    command("train", "recipe.yaml")
    free = validated(tmp_path / "free")
    assert [set(record) for record in free] == [
        {"kind", "step", "forgetting_kl", "forgetting_loss"}
    ] * 3
    content = evaluation_of(tmp_path / "free")
    assert content["before"]["metrics"] == content["after"]["metrics"] == {}
    assert content["forgetting"]["step"] == 3  # the last
    plan = json.loads((tmp_path / "free/plan.json").read_text())
    hidden = load_file(tmp_path / "free/forgetting.safetensors")["hidden_NE"]
    vocabulary = json.loads((Path(recipe_tree["model"]) / "config.json").read_text())["vocab_size"]
    assert plan["parts"]["forgetting"] == hidden.nbytes + 4 * vocabulary * hidden.shape[1]
    write({"max_kl": budget_between(tmp_path / "free", 2), "when_exceeded": "choose"}, "run")
    command("train", "recipe.yaml")
    assert evaluation_of(tmp_path / "run")["forgetting"]["step"] == 2
    assert evaluation_of(tmp_path / "run")["forgetting"]["kl"]["value"] == free[1]["forgetting_kl"]


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"adapter": {"init_lora_weights": "pissa"}}, False),
        ({"adapter": {"method": "dora"}, "base_weights": "nf4"}, False),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, False),
        (
            {"data": {"new_tokens": ["<tool>"]}},
            True,
        ),  # they take their share from the first step on
        ({"task": "text", "data": {"train": [{"path": "texts.jsonl"}]}}, False),
    ],
    ids=["pissa", "dora nf4", "a trained head", "new tokens", "text"],
)
def test_the_start_has_not_moved_whatever_is_trained(
    recipe_tree, tmp_path, command, changes, moved
) -> None:
    texts = [json.dumps({"text": f"Number {i} is a text of its own."}) for i in range(30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    tree_of(recipe_tree, tmp_path, guard={"max_kl": 1e-9}, **changes)
    result = json.loads(command("train", "recipe.yaml", "--json"))
    assert (result["reason"], result["step"]) == ("forgetting", 1)
    forgetting = result["evaluation"]["forgetting"]
    assert forgetting["step"] == 0
    start, now = forgetting["kl"]["value"], validated(tmp_path / "run")[0]["forgetting_kl"]
    assert 0 < start < 1e-3 if moved else start == 0
    assert now > start
    assert all(e["before"] == e["after"] for e in forgetting["examples"])


def test_a_resumed_run_compares_with_the_same_start(recipe_tree, tmp_path, command) -> None:
    """It began as an adapter, which a run that goes on does not load again."""
    tree_of(recipe_tree, tmp_path, output_dir="first")
    command("train", "recipe.yaml")
    started = {"adapter": {"init_from": "first/adapter"}}
    save = {"training": {"checkpoint_every_steps": 1, "save_total_limit": 9}}
    tree_of(recipe_tree, tmp_path, guard={"max_kl": 1.0}, output_dir="whole", **started, **save)
    command("train", "recipe.yaml")
    whole = tmp_path / "whole"
    assert validated(whole)[0]["forgetting_kl"] < validated(tmp_path / "first")[3]["forgetting_kl"]
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in (3, 4):  # as if it had been killed after the second step
        shutil.rmtree(run / f"checkpoints/step-00000{step}")
    (run / "evaluation.json").unlink()
    command("train", "recipe.yaml", "output_dir=run", "--resume")
    assert validated(run) == validated(whole)
    assert evaluation_of(run) == evaluation_of(whole)
    theirs = adapter_of(whole)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in adapter_of(run).items())
    (run / "forgetting.safetensors").unlink()
    shutil.rmtree(run / "checkpoints/step-000004")
    said = command("train", "recipe.yaml", "output_dir=run", "--resume", code=2)
    assert "forgetting.safetensors" in said


@pytest.mark.parametrize(
    "guard", [{}, {"max_kl": 0.1}, {"max_kl": 0.1, "when_exceeded": "choose", "answers": 0}]
)
def test_a_recipe_that_was_written_down_is_read_back(recipe_tree, guard) -> None:
    for held_out in (recipe_tree["data"]["validation"], None):
        data = recipe_tree["data"] | {"validation": held_out}
        tree = recipe_tree | {"data": data, "forgetting": guard, "evaluation": {"every_steps": 7}}
        recipe = Recipe.validate_tree(tree)
        read = Recipe.load_text(recipe.dump())
        assert read == recipe
        assert read.evaluation.every_steps == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"forgetting": {"when_exceeded": "stop"}}, ["when_exceeded", "max_kl: null"]),
        ({"forgetting": {"answers": 0, "max_new_tokens": 3}}, ["max_new_tokens", "answers: 0"]),
        ({"forgetting": {"prompts": 5, "answers": 6}}, ["answers: 6", "prompts: 5"]),
        ({"forgetting": {"prompts": 211}}, ["forgetting.prompts", "210"]),
        ({"forgetting": {"max_kl": 0}}, ["forgetting.max_kl"]),
        ({"forgetting": {}, "task": "regression"}, ["forgetting", "task: regression"]),
        (
            {
                "forgetting": {},
                "data": {"train": "x", "validation": None},
                "evaluation": {"metrics": ["loss"]},
            },
            ["data.validation is null", "evaluation.metrics"],
        ),
    ],
)
def test_what_does_not_fit_is_refused(recipe_tree, tmp_path, command, changes, words) -> None:
    write_recipe(recipe_tree | changes, tmp_path / "recipe.yaml")
    said = command("train", "recipe.yaml", code=2)
    for word in words:
        assert word in said
    assert not (tmp_path / "run").exists()
