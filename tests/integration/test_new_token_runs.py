"""Runs with tokens of their own, from the recipe to the export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CITIES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamaweft.data.chat import Encoder, stop_ids
from llamaweft.errors import UserError
from llamaweft.model.init import random_tensors
from llamaweft.model.presets import PRESETS
from llamaweft.model.save import write_model
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.pipeline import Pipeline
from llamaweft.plan.memory import trained_parameter_count
from llamaweft.predictions import predict
from llamaweft.recipe import Recipe
from llamaweft.settings import Evaluation
from llamaweft.subject import compare_subjects, export_run, open_subject
from llamaweft.weights.grown import row_parameters

TOKENS = ("<tool>", "<|city|>")
FIRST = 49152
DELTA = "trainable_tokens_delta"


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with one spare row, which was never trained: it is zero."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    folder.mkdir()
    tokenizer = load_tokenizer("builtin:smollm2-135m")
    config = replace(PRESETS["tiny"], vocab_size=FIRST + 1, tie_word_embeddings=True)
    tensors = dict(random_tensors(config, 1))
    tensors["model.embed_tokens.weight"][FIRST] = 0
    write_model(folder, config, tensors.items(), tokenizer.save_pretrained, dtype=torch.float32)
    return folder


@pytest.fixture
def tree(recipe_tree: dict, chats: Path) -> dict:
    """Chats whose answers are the new tokens, in turn with a city."""
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    for index, row in enumerate(rows):
        said = f"<tool><|city|>{CITIES[index % len(CITIES)]}"
        row["messages"][1]["content"] = said + " is where." * (index % 2)
    chats.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    recipe_tree["data"]["new_tokens"] = list(TOKENS)
    return recipe_tree


def pipeline(tree: dict) -> Pipeline:
    return Pipeline(Recipe.validate_tree(tree))


def loss_of(result: dict, side: str) -> float:
    return result["evaluation"][side]["metrics"]["loss"]["value"]


@pytest.mark.parametrize(("tied", "method"), [(False, "lora"), (True, "dora"), (True, "none")])
def test_from_recipe_to_export(
    tree: dict, tmp_path: Path, tied_folder: Path, tied: bool, method: str
) -> None:
    if tied:
        tree["model"] = str(tied_folder)
    if method == "none":
        tree["adapter"] = {"method": "none"}
        del tree["base_weights"]
    tree["adapter"]["method"] = method
    tree["training"] |= {"learning_rate": 3e-2, "max_steps": 8, "checkpoint_every_steps": 8}
    run = pipeline(tree)
    result = run.train()
    assert loss_of(result, "after") < loss_of(result, "before")
    assert not run.data.audit.blocking
    trained = load_file(tmp_path / "run/checkpoints/step-000008/trained.safetensors")
    assert sum(t.numel() for t in trained.values()) == trained_parameter_count(run.workload)
    if method != "none":
        decisions = json.loads((tmp_path / "run/plan.json").read_text())["decisions"]
        assert "with rows of 2 new tokens" in decisions["trained"]
        rows = {name: tuple(t.shape) for name, t in trained.items() if DELTA in name}
        held = ["model.embed_tokens"] + ([] if tied else ["lm_head"])
        assert rows == {f"{name}.{DELTA}": (2, 64) for name in held}
        config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
        ids = [FIRST, FIRST + 1]
        names = [name.rpartition(".")[2] for name in held]
        assert config["trainable_token_indices"] == dict.fromkeys(names, ids)

    # Evaluated, and asked, as it was trained.
    measured = open_subject(str(tmp_path / "run"))
    again = measured.measure(run.data.validation, Evaluation(metrics=["loss"]), None)
    assert again["metrics"]["loss"]["value"] == pytest.approx(loss_of(result, "after"), rel=1e-5)
    prompt = run.data.validation[0]
    predict(measured, [prompt], tmp_path / "said.jsonl", max_new_tokens=3)
    answer = json.loads((tmp_path / "said.jsonl").read_text())["answer"]
    assert "<tool>" in answer or "<|city|>" in answer

    parity = export_run(tmp_path / "run", "hf", tmp_path / "hf")
    assert parity is not None
    assert parity.passed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.config.vocab_size == len(tokenizer) == FIRST + 2
    assert model.get_input_embeddings().weight.shape == (FIRST + 2, 64)
    assert model.get_output_embeddings().weight.shape == (FIRST + 2, 64)
    given = torch.tensor([Encoder(tokenizer).prompt_ids(prompt)])
    said = model.generate(given, max_new_tokens=3, do_sample=False)[0, given.shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == answer
    assert tokenizer.convert_tokens_to_ids([*TOKENS]) == [FIRST, FIRST + 1]
    if method == "none":
        return
    parity = export_run(tmp_path / "run", "peft", tmp_path / "peft")
    assert parity is not None
    assert parity.passed
    for name in ("run/adapter", "peft"):
        opened = open_subject(str(tmp_path / name))
        rows = [row_parameters(subject.model) for subject in (opened, measured)]
        assert list(rows[0]) == list(rows[1]) == held
        assert all(torch.equal(*pair) for pair in zip(*(r.values() for r in rows), strict=True))
        assert opened.pipeline.tokenizer.get_vocab()["<|city|>"] == FIRST + 1


def test_a_killed_run_goes_on_bit_for_bit(tree: dict, tmp_path: Path) -> None:
    tree["base_weights"] = "int8"
    tree["training"] |= {"max_steps": 4}
    pipeline(tree).train()
    whole, half = tmp_path / "run", tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints/step-000004")
    pipeline(tree | {"output_dir": str(half)}).train(resume=True)
    for name in ("trained.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(r / "checkpoints/step-000004" / name) for r in (half, whole))
        assert sum(DELTA in key for key in theirs) >= 2
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    del tree["data"]["new_tokens"][1]
    with pytest.raises(UserError, match=r"data\.new_tokens"):
        pipeline(tree | {"output_dir": str(half)}).train(resume=True)


def test_the_prepared_rows_depend_on_them(tree: dict) -> None:
    without = pipeline(
        tree | {"data": {k: v for k, v in tree["data"].items() if k != "new_tokens"}}
    )
    with_them = pipeline(tree)
    assert max(max(document.ids) for document in without.data.documents) < FIRST
    assert max(max(document.ids) for document in with_them.data.documents) == FIRST + 1
    other = with_them.changed({"training.seed": "1"})
    assert list(other.new_tokens.ids) == [FIRST, FIRST + 1]
    assert other.config.vocab_size == FIRST + 2


def test_the_base_and_the_export_are_compared_on_the_same_rows(tree: dict, tmp_path: Path) -> None:
    tree["training"] |= {"max_steps": 2}
    result = pipeline(tree).train()
    export_run(tmp_path / "run", "hf", tmp_path / "hf", verify=False)
    compared = compare_subjects(str(tmp_path / "run"), tree["model"])
    for side in ("before", "after"):
        value = compared[side]["metrics"]["loss"]["value"]
        assert value == pytest.approx(loss_of(result, side), rel=1e-5)
    of_export = compare_subjects(str(tmp_path / "hf"), None, recipe=tmp_path / "run/recipe.yaml")
    value = of_export["before"]["metrics"]["loss"]["value"]
    assert value == pytest.approx(loss_of(result, "after"), rel=1e-4)


def test_a_run_goes_on_from_an_adapter_with_the_same_tokens_only(
    tree: dict, tmp_path: Path
) -> None:
    tree["training"] |= {"max_steps": 2}
    first = pipeline(tree).train()
    shutil.copytree(tmp_path / "run/adapter", tmp_path / "moved")
    tree["adapter"]["init_from"] = str(tmp_path / "moved")
    second = pipeline(tree | {"output_dir": str(tmp_path / "second")}).train()
    assert loss_of(second, "before") == loss_of(first, "after")
    for tokens, said in (([*TOKENS[::-1]], "<|city|>, <tool>"), ([], "none")):
        tree["data"]["new_tokens"] = tokens
        with pytest.raises(UserError, match=r"adapter\.init_from: .*<tool>, <\|city\|>") as error:
            pipeline(tree | {"output_dir": str(tmp_path / "third")}).train()
        assert f"the recipe has {said};" in str(error.value)
    assert not (tmp_path / "third").exists()


def test_a_control_token_can_end_the_turns_of_a_template_of_its_own(
    tree: dict, tmp_path: Path, tied_folder: Path
) -> None:
    """It gets the spare row, which the audit would call untrained."""
    tree["model"] = str(tied_folder)
    template = tmp_path / "turns.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|over|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tree["data"] |= {"new_tokens": [{"token": "<|over|>", "special": True}, *TOKENS]}
    tree["data"]["chat_template"] = str(template)
    run = pipeline(tree)
    assert FIRST in stop_ids(run.tokenizer)
    result = run.train()
    assert loss_of(result, "after") < loss_of(result, "before")
    assert Recipe.load(tmp_path / "run/recipe.yaml").data.new_tokens[0].special
    parity = export_run(tmp_path / "run", "hf", tmp_path / "hf")
    assert parity is not None
    assert parity.passed
    stops = json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"]
    assert FIRST in stops


@pytest.mark.parametrize("task", ["sequence_classification", "question_answering"])
def test_a_head_of_the_task_trains_the_embeddings_rows(
    recipe_tree: dict, tmp_path: Path, tied_folder: Path, task: str
) -> None:
    rows = [{"text": f"{TOKENS[i % 2]} on day {i}", "label": "ab"[i % 2]} for i in range(40)]
    if task == "question_answering":
        answer = {"text": ["Rome"], "answer_start": [7]}
        context = "<tool> Rome"
        rows = [
            {"question": f"{i}?", "context": f"{context} {i}", "answers": answer} for i in range(40)
        ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "validation": {"fraction": 0.2}}
    recipe_tree |= {
        "task": task,
        "data": data | {"new_tokens": [*TOKENS]},
        "model": str(tied_folder),
    }
    del recipe_tree["evaluation"]["max_new_tokens"]
    run = pipeline(recipe_tree)
    result = run.train()
    assert loss_of(result, "after") < loss_of(result, "before")
    trained = load_file(tmp_path / "run/checkpoints/step-000006/trained.safetensors")
    assert sum(DELTA in name for name in trained) == 1
    again = open_subject(str(tmp_path / "run"))
    measured = again.measure(
        run.data.validation_documents.examples, Evaluation(metrics=["loss"]), None
    )
    assert measured["metrics"]["loss"]["value"] == pytest.approx(loss_of(result, "after"), rel=1e-5)
    for to in ("hf", "peft") if task != "question_answering" else ("hf",):
        parity = export_run(tmp_path / "run", to, tmp_path / to)
        assert parity is not None
        assert parity.passed


# --- what is refused before the start ------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["<x>", ""], r"data\.new_tokens: '' is empty or only white space"),
        ([" "], r"data\.new_tokens: ' ' is empty or only white space"),
        (["<x>", "<y>", "<x>"], r"data\.new_tokens: '<x>' is in the list twice"),
        (["hello"], r"data\.new_tokens: .* has 'hello' already"),
        ([{"token": "<x>", "single": True}], r"unknown key 'data\.new_tokens\.0\.single'"),
    ],
)
def test_what_is_no_new_token_is_refused(
    recipe_tree: dict, tmp_path: Path, tokens: list, words: str
) -> None:
    recipe_tree["data"]["new_tokens"] = tokens
    with pytest.raises(UserError, match=words):
        pipeline(recipe_tree).train()
    assert not (tmp_path / "run").exists()


def test_an_adapter_whose_tokens_have_no_names_is_refused(tree: dict, tmp_path: Path) -> None:
    tree["training"] |= {"max_steps": 1}
    pipeline(tree).train()
    for file in (tmp_path / "run/adapter").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        open_subject(str(tmp_path / "run/adapter"))
