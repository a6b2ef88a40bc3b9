"""The recipe: what is refused, with which words, and what comes back from a dump."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamaweft.errors import UserError
from llamaweft.recipe import Recipe, describe
from llamaweft.settings import METRICS, parse_bytes

MINIMAL = "model: some/model\ndata: {train: chats.jsonl}\n"


def load(text: str, tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return Recipe.load(path, overrides)


def test_only_model_and_data_are_needed(tmp_path: Path) -> None:
    recipe = load(MINIMAL, tmp_path)
    assert recipe.data.train[0].path == "chats.jsonl"
    assert recipe.data.validation is not None
    assert recipe.data.validation.fraction == 0.05
    assert (recipe.adapter.method, recipe.adapter.r, recipe.task) == ("lora", 16, "chat")


def test_numbers_are_yaml_1_2(tmp_path: Path) -> None:
    recipe = load(MINIMAL + "training: {learning_rate: 2e-4, memory_budget: 8GiB}\n", tmp_path)
    assert recipe.training.learning_rate == 2e-4
    assert recipe.training.memory_budget == 8 * 2**30


def test_a_dump_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load(MINIMAL, tmp_path, "training.max_steps=7", "data.validation=null")
    assert Recipe.load_text(recipe.dump()) == recipe
    full = load(MINIMAL, tmp_path, "adapter.method=none")
    assert Recipe.load_text(full.dump()) == full


def test_a_dump_makes_local_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").touch()
    assert Recipe.load_text(load(MINIMAL, tmp_path).dump()).data.train[0].path == str(
        tmp_path / "chats.jsonl"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "training:\n  learnin_rate: 1\n", ["line 4", "training.learnin_rate", "did you mean 'training.learning_rate'"]),
        (MINIMAL + "trainin: {}\n", ["line 3", "unknown key 'trainin'"]),
        (MINIMAL + "training: {memory_budget: 8GiX}\n", ["line 3", "training.memory_budget", "8GiB"]),
        (MINIMAL + "training: {optimizer: sgd}\n", ["line 3", "training.optimizer", "adamw", "adamw_8bit"]),
        (MINIMAL + "training: {compute_dtype: fp8}\n", ["line 3", "training.compute_dtype", "fp16"]),
        (MINIMAL + "base_weights: fp16\n", ["line 3", "base_weights", "bf16"]),
        (MINIMAL + "training: {max_steps: 0}\n", ["line 3", "training.max_steps", "greater than or equal to 1"]),
        (MINIMAL + "evaluation:\n  metrics: [loss, bleurt]\n", ["line 4", "evaluation.metrics.1", "unknown metric 'bleurt'; did you mean 'bleu'?", "exact_match"]),
        (MINIMAL + "evaluation:\n  metrics: ['my package:f']\n", ["line 4", "evaluation.metrics.0", "package.module:function"]),
        (MINIMAL + "evaluation: {metrics: [3]}\n", ["evaluation.metrics.0", "string"]),
        (MINIMAL + "adapter: {method: none, r: 8}\n", ["full fine-tuning", "adapter.r"]),
        (MINIMAL + "adapter: {method: none, init_from: a}\n", ["adapter.init_from"]),
        (MINIMAL + "adapter: {method: none, loraplus_lr_ratio: 4}\n", ["adapter.loraplus_lr_"]),
        (MINIMAL + "adapter: {loraplus_lr_ratio: 0.5}\n", ["adapter.loraplus_lr_ratio", "0.5"]),
        (MINIMAL + "adapter: {method: dora, lora_dropout: 0.1}\n", ["line", "lora_dropout: 0"]),
        (MINIMAL + "adapter: {init_lora_weights: pisa}\n", ["line 3", "adapter.init_lora_weights", "pissa_niter_"]),
        (MINIMAL + "adapter: {init_lora_weights: pissa, method: dora}\n", ["line 3", "plain adapter; set method: lora"]),
        (MINIMAL + "adapter: {init_lora_weights: pissa, method: none}\n", ["adapter.init_lora_weights", "would be ignored"]),
        (MINIMAL + "adapter: {init_lora_weights: pissa, lora_dropout: 0.1}\n", ["line 3", "set lora_dropout: 0"]),
        (MINIMAL + "adapter: {init_lora_weights: pissa_niter_4, init_from: a}\n", ["line 3", "init_from", "pissa_niter_4 would be ignored"]),
        (MINIMAL + "adapter: {init_lora_weights: pissa}\nbase_weights: int8\n", ["base_weights: int8 is quantised", "set base_weights: bf16"]),
        (MINIMAL + "adapter: {method: none}\nbase_weights: bf16\n", ["base_weights", "fp32"]),
        ("model: m\ndata: {train: []}\n", ["line 2", "data.train"]),
        ("model: m\ndata: {train: [{pth: x}]}\n", ["line 2", "data.train.0.pth", "data.train.path"]),
        ("model: m\ndata: {train: x, validation: {fraction: 0.1, path: y}}\n", ["data.validation", "exactly one"]),
        ("data: {train: x}\n", ["'model' is missing"]),
        ("- a\n", ["not a mapping"]),
        ("model: [\n", ["not valid YAML", "line"]),
        ("model: a\nmodel: b\n", ["not valid YAML"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(text, tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_a_users_own_metric_is_accepted_and_dumped(tmp_path: Path) -> None:
    recipe = load(MINIMAL, tmp_path, "evaluation.metrics=[rougeL, 'pack.module:metric']")
    assert recipe.evaluation.metrics == ["rougeL", "pack.module:metric"]
    assert Recipe.load_text(recipe.dump()) == recipe


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(MINIMAL + "foo: 1\nbar: 2\n", tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    text = "model: m\ndata:\n  train: [{path: a}]\n"
    assert load(text, tmp_path, "data.train.0.path=b").data.train[0].path == "b"
    with pytest.raises(UserError, match="no index"):
        load(text, tmp_path, "data.train.3.path=b")
    with pytest.raises(UserError, match="no override"):
        load(text, tmp_path, "training.seed")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no recipe"):
        Recipe.load(tmp_path / "none.yaml")


def test_changes_say_what_a_resumed_run_may_change(tmp_path: Path) -> None:
    """What changes no step may change; all that differs is named, with both values."""
    recipe = load(MINIMAL, tmp_path)
    assert recipe.changes(recipe) == []
    same = load(MINIMAL, tmp_path, "training.save_total_limit=9", "guard.max_skipped_steps=5")
    assert [(change.key, change.allowed) for change in recipe.changes(same)] == [
        ("guard.max_skipped_steps", True),
        ("training.save_total_limit", True),
    ]
    other = load(MINIMAL, tmp_path, "training.learning_rate=1", "training.max_steps=7")
    changes = recipe.changes(other)
    assert [str(change) for change in changes] == [
        "training.learning_rate: 0.0002 -> 1.0",
        "training.max_steps: null -> 7",
    ]
    assert not any(change.allowed for change in changes)


def test_every_key_is_described() -> None:
    table = describe()
    assert {
        "model",
        "training.learning_rate",
        "data.train.path",
        "data.validation.fraction",
        "data.clean",
        "data.clean.near_duplicates.threshold",
    } <= set(table)
    assert not [key for key, text in table.items() if text.startswith("None")]
    assert table["training.learning_rate"].endswith("[0.0002]")
    assert all(metric in table["evaluation.metrics"] for metric in METRICS)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1KiB", 1024), ("1.5GiB", 3 * 2**29), ("2GB", 2 * 10**9), ("17", 17), (5, 5)],
)
def test_sizes(text: object, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("length", range(40, 90))
def test_long_names_with_control_characters_come_back(length: int, tmp_path: Path) -> None:
    """Wherever a line of the dump would be folded."""
    name = f"/{'a' * length}/\x1b[31m<img src=x onerror=alert(1)>[red]a"
    recipe = load(MINIMAL, tmp_path, f"output_dir={json.dumps(name)}")
    assert Recipe.load_text(recipe.dump()).output_dir == name
