"""Each mistake that looks like a healthy run stops `train` before its first step, until it is mended
or the recipe allows it. docs/data.md lists them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_recipe
from safetensors.torch import load_file, save_file
from test_cli import llamaweft

from llamaweft.data.audit import BLOCKING


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


WORDS = [f"word{i}" for i in range(20)]
GOOD = [
    chat(("user", f"Question {i}?"), ("assistant", f"Answer {i} of {WORDS[i]}.")) for i in range(20)
]
ANSWER = " ".join(WORDS)

ROWS = {
    "role_order": chat(("user", "One?"), ("user", "Two?"), ("assistant", "Both.")),
    "empty_answer": chat(("user", "Say nothing."), ("assistant", " \n")),
    "no_trained_token": chat(("user", "Only a question?")),
    "too_long": chat(("user", "At length?"), ("assistant", ANSWER * 20)),
    "validation_leak": chat(("user", "Held out?"), ("assistant", f"Held out: {ANSWER}.")),
}
HELD = [ROWS["validation_leak"], chat(("user", "Another?"), ("assistant", "Other."))]

RARE = {"text": "Nothing like the others", "label": "rare"}
CLASSIFIED = [{"text": f"Text {i} of {WORDS[i]}", "label": "ab"[i % 2]} for i in range(20)]
"""`rare_class` needs a task with classes."""

PAIRS = [
    {"prompt": f"Question {i}?", "chosen": f" Answer {i} of {WORDS[i]}.", "rejected": f" No {i}."}
    for i in range(20)
]
SAME = {"prompt": "Question?", "chosen": " Yes.", "rejected": " Yes.<|im_end|>"}
"""`same_answers` needs a task of pairs; the end token is put where it is missing."""

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
TEMPLATES = {
    "untrained_end_of_turn": TURNS.replace("END", ""),
    "begin_of_text": "<|im_start|><|im_start|>" + TURNS.replace("END", "<|im_end|>"),
}


def without_end_of_turn(folder: Path, tensors: dict) -> None:
    tensors["model.embed_tokens.weight"][2] = 0.0  # <|im_end|>


def with_fewer_tokens(folder: Path, tensors: dict) -> None:
    for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        tensors[name] = tensors[name][:300].clone()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))


MODELS = {"untrained_token": without_end_of_turn, "out_of_vocabulary": with_fewer_tokens}


@pytest.fixture
def planted(recipe_tree: dict, tmp_path: Path):
    """A recipe with some of the mistakes above."""

    def recipe(*checks: str, allow: tuple[str, ...] = ()) -> dict:
        rows = [*GOOD, *(ROWS[check] for check in checks if check in ROWS)]
        files = {"rows.jsonl": rows, "held.jsonl": HELD}
        if "rare_class" in checks:
            held = [row | {"text": f"Held: {row['text']}"} for row in CLASSIFIED[:4]]
            files = {"rows.jsonl": [*CLASSIFIED, RARE], "held.jsonl": held}
            recipe_tree["task"] = "sequence_classification"
        if "same_answers" in checks:
            held = [row | {"prompt": f"Held out: {row['prompt']}"} for row in PAIRS[:4]]
            files = {"rows.jsonl": [*PAIRS, SAME], "held.jsonl": held}
            recipe_tree["task"] = "reward"
        for name, content in files.items():
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        recipe_tree["data"] = {
            "train": str(tmp_path / "rows.jsonl"),
            "validation": {"path": str(tmp_path / "held.jsonl")},
            "max_length_tokens": 200,
        }
        recipe_tree["training"]["max_steps"] = 1
        recipe_tree["audit"] = {"allow": list(allow)}
        for check in checks:
            if check in TEMPLATES:
                (tmp_path / "planted.jinja").write_text(TEMPLATES[check])
                recipe_tree["data"]["chat_template"] = str(tmp_path / "planted.jinja")
            if check in MODELS:
                recipe_tree["model"] = str(_changed(Path(recipe_tree["model"]), tmp_path, check))
        return recipe_tree

    return recipe


def _changed(model: Path, tmp_path: Path, check: str) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    MODELS[check](folder, tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


PLANTED = (*ROWS, *TEMPLATES, *MODELS, "rare_class", "same_answers")


def test_every_check_that_blocks_is_planted() -> None:
    assert set(PLANTED) == set(BLOCKING)


@pytest.mark.parametrize("check", PLANTED)
def test_train_stops_before_its_first_step(planted, tmp_path: Path, check: str) -> None:
    tree = planted(check)
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    done = llamaweft("train", recipe, cwd=tmp_path, code=2)
    assert check in done.stderr
    assert not (Path(tree["output_dir"]) / "metrics.jsonl").exists()


def test_without_a_mistake_it_trains(planted, tmp_path: Path) -> None:
    recipe = write_recipe(planted(), tmp_path / "recipe.yaml")
    llamaweft("train", recipe, cwd=tmp_path)


def test_what_the_recipe_allows_is_trained(planted, tmp_path: Path) -> None:
    check_allowed(planted, tmp_path, (*ROWS, "untrained_token", "begin_of_text"))


@pytest.mark.parametrize("check", ["rare_class", "same_answers"])
def test_what_the_recipe_allows_is_trained_by_other_tasks(
    planted, tmp_path: Path, check: str
) -> None:
    check_allowed(planted, tmp_path, (check,))


def check_allowed(planted, tmp_path: Path, allowed: tuple[str, ...]) -> None:
    recipe = write_recipe(planted(*allowed, allow=allowed), tmp_path / "recipe.yaml")
    llamaweft("train", recipe, cwd=tmp_path)
    audit = json.loads((tmp_path / "run" / "audit.json").read_text())
    status = {finding["check"]: finding["status"] for finding in audit["findings"]}
    assert {status[check] for check in allowed} == {"allowed"}
