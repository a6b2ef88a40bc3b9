"""Rewards from the command line: learnt from pairs, measured, exported, resumed, and refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CITIES, write_recipe
from safetensors.torch import load_file
from test_tasks import refused
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llamaweft.model.head_config import HeadConfig
from llamaweft.pipeline import open_run

KIND, RUDE = ("Gladly", "With pleasure", "Of course"), ("Nonsense", "Rubbish", "No")
SYSTEM = {"role": "system", "content": "You answer questions on cities, in short."}


def row_of(i: int, *, plain: bool = False) -> dict:
    """Told apart by single words, so that a small model learns it."""
    city, tail = CITIES[i % len(CITIES)], f", {i} is the answer."
    asked, chosen, rejected = (
        f"What is {i} in {city}?",
        f"{KIND[i % 3]}{tail}",
        f"{RUDE[i % 3]}{tail}",
    )
    if plain:
        return {"prompt": f"{asked}\n", "chosen": chosen, "rejected": rejected}
    prompt = [SYSTEM, {"role": "user", "content": asked}]
    sides = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {"prompt": prompt} | dict(zip(("chosen", "rejected"), sides, strict=True))


def write_run(
    folder: Path, tiny_folder: Path, rows: list[dict], adapter: dict | None = None, **keys
) -> dict:
    """A recipe for 40 pairs; returns its content."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    training = {"learning_rate": 1e-2, "max_steps": 8, "micro_batch_tokens": 256}
    training |= {"gradient_accumulation_steps": 2, "checkpoint_every_steps": 4}
    tree = {
        "model": str(tiny_folder),
        "task": "reward",
        "data": {"train": "rows.jsonl", "validation": {"fraction": 0.3}},
        "adapter": adapter or {"r": 4},
        "training": training | {"compute_dtype": "fp32", "device": "cpu"},
        "base_weights": "fp32",
        "evaluation": {"every_steps": 8, "metrics": ["loss", "accuracy"]},
        "output_dir": "run",
    }
    for section, content in keys.items():
        tree[section] = tree.get(section, {}) | content
    write_recipe(tree, folder / "recipe.yaml")
    return tree


@pytest.mark.parametrize(
    ("adapter", "plain"),
    [({"r": 4}, False), ({"r": 4, "method": "dora"}, True), ({"method": "none"}, False)],
)
def test_a_reward_from_rows_to_export(
    tiny_folder: Path,
    tmp_path: Path,
    command,
    adapter: dict,
    plain: bool,
) -> None:
    rows = [row_of(i, plain=plain) for i in range(40)]
    write_run(tmp_path, tiny_folder, rows, adapter, head={"center_rewards_coefficient": 0.01})
    override = f"training.learning_rate={1e-3 if adapter.get('method') == 'none' else 5e-3}"
    plan = json.loads(command("plan", "recipe.yaml", override, "--json"))
    assert "of" in plan["decisions"]["prefixes"]
    command("train", "recipe.yaml", override)
    run = open_run(tmp_path / "run")
    assert run is not None
    assert run.head == HeadConfig("reward", (), center_rewards_coefficient=0.01)
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    before, after = (evaluation[side]["metrics"] for side in ("before", "after"))
    assert evaluation["difference"]["loss"]["verdict"] == "better", evaluation
    assert before["accuracy"]["value"] < 0.9 < after["accuracy"]["value"]
    assert after["loss"]["count"] == 12
    assert before["loss"]["value"] == pytest.approx(0.69, abs=0.2)
    shown = evaluation["examples"][0]
    row = rows[int(shown["where"].rpartition(" ")[2]) - 1]
    said = [row[n] if plain else row[n][0]["content"] for n in ("chosen", "rejected")]
    assert shown["reference"] == f"chosen: {said[0]}\nrejected: {said[1]}"
    found = re.fullmatch(r"chosen (\S+), rejected (\S+) \((\S+)\)", shown["after"])
    assert found is not None
    better, worse, margin = map(float, found.groups())
    assert margin == pytest.approx(better - worse, rel=0.1)
    assert margin > 0.1
    assert row["prompt"] in (shown["prompt"], [SYSTEM, {"role": "user", "content": shown["prompt"].partition("\n")[2]}])  # fmt: skip

    again = json.loads(command("evaluate", "run", "--json"))["before"]["metrics"]
    for name, value in after.items():
        assert again[name] == pytest.approx(value, rel=1e-5), name
    assert "task: reward" in command("chat", "run", "--message", "Hello", code=2)

    check_exports(tmp_path, command, row, plain, better, adapter)
    check_resume(tmp_path, command, override)


def check_exports(
    folder: Path,
    command,
    row: dict,
    plain: bool,
    reward: float,
    adapter: dict,
) -> None:
    """The export's own class gives the reward that was measured, of the text as a person has it."""
    to_hf = json.loads(command("export", "run", "--to", "hf", "--output", "hf", "--json"))
    assert to_hf["parity"]["passed"]
    to_peft = ("export", "run", "--to", "peft", "--output", "peft", "--json")
    if adapter.get("method") == "none":
        assert "no adapter" in command(*to_peft, code=2)
    else:
        assert json.loads(command(*to_peft))["parity"]["passed"]
    config = json.loads((folder / "hf/config.json").read_text())
    assert config["num_labels"] == 1
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert "problem_type" not in config
    model = AutoModelForSequenceClassification.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    if plain:
        given = tokenizer(row["prompt"] + row["chosen"] + tokenizer.eos_token, return_tensors="pt")
    else:
        chat = [*row["prompt"], *row["chosen"]]
        given = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
    assert model.eval()(**given).logits.item() == pytest.approx(reward, rel=1e-3, abs=1e-3)


def check_resume(folder: Path, command, override: str) -> None:
    """From its first checkpoint the run goes on to the same bits."""
    shutil.copytree(folder / "run", folder / "half")
    shutil.rmtree(folder / "half/checkpoints/step-000008")
    (folder / "half/evaluation.json").unlink()
    command("train", "recipe.yaml", override, "output_dir=half", "--resume")
    for name in ("trained", "optimizer"):
        files = [folder / run / f"checkpoints/step-000008/{name}.safetensors" for run in ("run", "half")]  # fmt: skip
        ours, theirs = map(load_file, files)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert any("score" in key for key in theirs)
    sides = [json.loads((folder / run / "evaluation.json").read_text()) for run in ("run", "half")]
    assert sides[0] == sides[1]


def test_rows_show_both_texts(tiny_folder: Path, tmp_path: Path, command) -> None:
    write_run(tmp_path, tiny_folder, [row_of(i) for i in range(4)])
    (shown,) = json.loads(command("data", "show", "recipe.yaml", "--rows", "1", "--json"))
    row = row_of(int(shown["where"].rpartition(" ")[2]) - 1)
    assert shown["labels"] == ["chosen", "rejected"]
    sides = shown["tokens"][: shown["second"]], shown["tokens"][shown["second"] :]
    for side, tokens in zip(("chosen", "rejected"), sides, strict=True):
        assert "".join(tokens).endswith(f"{row[side][0]['content']}<|im_end|>\n")
    said = command("data", "show", "recipe.yaml", "--rows", "1")
    words = ("chosen\n", row["chosen"][0]["content"], "rejected\n", row["rejected"][0]["content"])
    places = [said.index(word) for word in words]
    assert places == sorted(places), said


GOOD = [row_of(i) for i in range(20)]
TEXTS = [row_of(i, plain=True) for i in range(20)]
SAME = {"prompt": "q", "chosen": "a", "rejected": "a"}
EMPTY = TEXTS[0] | {"chosen": ""}
LONG = TEXTS[0] | {"rejected": "word " * 600}


@pytest.mark.parametrize(
    ("rows", "keys", "words"),
    [
        ([{"text": "a", "label": "b"}], {}, ["rows.jsonl line 1", "classification", "preference"]),
        ([*TEXTS, SAME], {}, ["rows.jsonl line 21", "say the same"]),
        (
            [*TEXTS, TEXTS[0] | {"rejected": None}],
            {},
            ["rows.jsonl line 21", "'rejected'", "missing"],
        ),
        ([{"prompt": "q", "chosen": "a"}], {}, ["rows.jsonl line 1", "no known shape"]),
        ([*TEXTS, EMPTY], {}, ["empty_answer", "rows.jsonl line 21"]),
        ([*TEXTS, LONG], {"data": {"max_length_tokens": 500}}, ["too_long", "rows.jsonl line 21"]),
        (GOOD, {"data": {"on_too_long": "split"}}, ["data.on_too_long: split", "use drop"]),
        (GOOD, {"data": {"on_too_long": "truncate"}}, ["data.on_too_long: truncate", "use drop"]),
        (GOOD, {"data": {"train_on": "last"}}, ["data.train_on", "task: reward"]),
        (TEXTS, {"data": {"chat_template": "chatml"}}, ["data.chat_template: chatml", "text"]),
        (GOOD, {"head": {"class_weights": "balanced"}}, ["head.class_weights", "task: reward"]),
        (GOOD, {"training": {"label_smoothing": 0.1}}, ["training.label_smoothing", "reward"]),
        (GOOD, {"evaluation": {"metrics": ["macro_f1"]}}, ["metrics: macro_f1", "loss, accuracy"]),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_folder: Path,
    tmp_path: Path,
    command,
    rows: list,
    keys: dict,
    words: list[str],
) -> None:
    tree = write_run(tmp_path, tiny_folder, rows, **keys)
    (tmp_path / "held.jsonl").write_text(json.dumps(row_of(99)), encoding="utf-8")
    tree["data"]["validation"] = {"path": "held.jsonl"}
    refused(tree, tmp_path, command, *words)


def test_centring_is_a_key_of_rewards(tiny_folder: Path, tmp_path: Path, command) -> None:
    tree = write_run(tmp_path, tiny_folder, GOOD, head={"center_rewards_coefficient": 0.01})
    tree |= {"task": "regression", "evaluation": {"metrics": ["loss"]}}
    refused(tree, tmp_path, command, "head.center_rewards_coefficient", "regression")


def test_templates_write_messages_of_rewards(tiny_folder: Path, tmp_path: Path, command) -> None:
    rows = [row_of(i, plain=i % 2 == 0) for i in range(20)]
    write_run(tmp_path, tiny_folder, rows, data={"chat_template": "chatml"})
    command("train", "recipe.yaml", "training.max_steps=1", "head.center_rewards_coefficient=null")
    assert (tmp_path / "run/evaluation.json").exists()
