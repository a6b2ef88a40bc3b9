"""Exports from the command line: written, opened by what they are for, and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CITIES, SIX_SHORT_STEPS
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llamaweft import exports
from llamaweft.errors import RunError, UserError
from llamaweft.export import llama_cpp, parity
from llamaweft.pipeline import Pipeline, open_run
from llamaweft.plan import hardware
from llamaweft.recipe import Recipe
from llamaweft.subject import export_run

FIELDS = {
    "consumer", "compared_with", "computed_in", "merged_into", "relative_difference",
    "max_difference", "kl", "same_greedy_tokens", "tokens", "tolerance", "kl_to_live", "texts",
    "other_ids", "passed",
}  # fmt: skip


def trained(folder: Path, model: Path, rows: list[dict], **changes) -> Path:
    """The folder of a run of six short steps."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tree = {
        "model": str(model),
        "data": {"train": str(folder / "rows.jsonl"), "validation": {"fraction": 0.2}},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
        "base_weights": "nf4",
        "training": SIX_SHORT_STEPS | {"compute_dtype": "fp32", "device": "cpu"},
        "evaluation": {"every_steps": 6, "metrics": ["loss"]},
        "output_dir": str(folder / "run"),
    }
    Pipeline(Recipe.validate_tree(tree | changes)).train()
    return folder / "run"


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on nf4."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}: what of {CITIES[i % 10]}?"},
                {"role": "assistant", "content": f"I like {CITIES[i % 10]}." + " And more." * (i % 3)},
            ]
        }
        for i in range(30)
    ]  # fmt: skip
    return trained(tmp_path_factory.mktemp("nf4"), tiny_folder, chats)


@pytest.fixture(scope="module")
def classes(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": f"Day {i} was {'ab'[i % 2]}", "label": "ab"[i % 2]} for i in range(40)]
    folder = tmp_path_factory.mktemp("classes")
    return trained(folder, tiny_folder, rows, task="sequence_classification", base_weights="fp32")


@pytest.fixture(autouse=True)
def few_positions(monkeypatch) -> None:
    monkeypatch.setattr(llama_cpp, "POSITIONS", 3)


def as_json(said: str) -> dict:
    return json.loads(said)["parity"]


def test_a_merge_into_original_weights_and_one_into_held_ones(
    run: Path, tmp_path: Path, command, tiny_folder: Path
) -> None:
    to_hf = ("export", run, "--to", "hf", "--json", "--output")
    original = as_json(command(*to_hf, tmp_path / "original"))
    held = as_json(command(*to_hf, tmp_path / "held", "--merge-into", "dequantised"))
    assert set(original) == set(held) == FIELDS
    assert original == json.loads((tmp_path / "original/parity.json").read_text())
    assert original["compared_with"] == "the original weights with the adapter"
    assert held["compared_with"] == "the model as it was trained"
    assert (original["merged_into"], held["merged_into"]) == ("original", "dequantised")
    assert 0 < original["kl_to_live"] < 0.1
    assert held["kl_to_live"] is None
    assert original["relative_difference"] < 1e-2
    assert held["relative_difference"] < 1e-2

    # What no adapter touched is the original, rounded to bf16, or what nf4 made of it.
    base = load_file(tiny_folder / "model.safetensors")["model.embed_tokens.weight"]
    for name, same in (("original", True), ("held", False)):
        found = load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(found, base.to(torch.bfloat16)) == same
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("original", "held")
    ]
    ids = torch.arange(40, 400, 9)[None]
    with torch.no_grad():
        a, b = (model(ids).logits for model in models)
    assert (a - b).norm() / b.norm() > 1e-2


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        (None, 3e-2),
        pytest.param("f32", 1e-4, marks=pytest.mark.slow),
        pytest.param("bf16", 3e-2, marks=pytest.mark.slow),
        pytest.param("q4_0", 0.35, marks=pytest.mark.slow),
    ],
)
def test_a_gguf_opened_by_llama_cpp(
    run: Path, tmp_path: Path, command, name: str | None, tolerance: float
) -> None:
    chosen = ["--quantization", name] if name else []
    to_gguf = ("export", run, "--to", "gguf", "--output", tmp_path / "out", "--json")
    proof = as_json(command(*to_gguf, *chosen))
    assert set(proof) == FIELDS
    assert proof["consumer"].startswith("llama.cpp (xllamacpp ")
    assert proof["relative_difference"] < tolerance
    assert proof["merged_into"] == "original"
    assert proof["kl_to_live"] > 0
    assert proof["tokens"] == 12
    assert proof["texts"] > 20  # with each special token, and a chat
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["parity.json", f"run-{name or 'q8_0'}.gguf"]
    fields = GGUFReader(tmp_path / "out" / found[1]).fields
    assert fields["general.name"].contents() == "run"


def test_a_folder_for_ollama(run: Path, tmp_path: Path, command) -> None:
    command("export", run, "--to", "ollama", "--output", tmp_path / "out", "--no-verify")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "run-q8_0.gguf"]
    lines = (tmp_path / "out/Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./run-q8_0.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert lines[-1] == "PARAMETER num_ctx 2048"
    assert any("You are a helpful AI assistant named SmolLM" in line for line in lines)


def test_a_head_alone_says_what_the_model_says(classes: Path, tmp_path: Path, command) -> None:
    to = ("export", classes, "--output")
    proof = as_json(command(*to, tmp_path / "head", "--to", "head", "--json"))
    assert proof["relative_difference"] < 1e-6
    command(*to, tmp_path / "hf", "--to", "hf", "--no-verify")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    head = load_file(tmp_path / "head/head.safetensors")
    assert list(head) == ["score.weight"]
    assert torch.equal(head["score.weight"], model.score.weight)
    config = json.loads((tmp_path / "head/config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b"}
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["hidden_size"] == 64


def test_the_proof_of_a_merge_sees_another_update(run: Path, tmp_path: Path, monkeypatch) -> None:
    """A merge that forgets the scale: 2 here."""
    from llamaweft.adapters.lora import LoraLinear

    def unscaled(layer, base_NI, rows):
        return base_NI + (layer.lora_B[rows] @ layer.lora_A).detach()

    monkeypatch.setattr(LoraLinear, "merged_rows", unscaled)
    monkeypatch.setitem(parity.TOLERANCES, "hf bf16", 1e-2)
    with pytest.raises(RunError, match="differently from the original weights with the adapter"):
        export_run(run, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_proof_of_a_gguf_sees_other_ids(run: Path, tmp_path: Path, monkeypatch) -> None:
    """Without the control tokens' kind, llama.cpp reads their names as text."""
    real = exports.gguf_tokenizer
    monkeypatch.setattr(
        exports,
        "gguf_tokenizer",
        lambda *given: replace(real(*given), types=[1] * len(real(*given).types)),
    )
    with pytest.raises(RunError, match=r"its tokenizer reads (?!1 of)\d+ of \d+ texts otherwise"):
        export_run(run, "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("gguf", "--quantization", "q4_k"), "--quantization q4_k: give one of f32, f16"),
        (("hf", "--quantization", "q8_0"), "--quantization is of a GGUF, and --to hf writes none"),
        (("peft", "--merge-into", "original"), "--to peft merges nothing"),
        (("head",), "task: chat, so it has no head of its own"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    run: Path, tmp_path: Path, command, monkeypatch, options: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(Pipeline, "trained_model", lambda self: pytest.fail("it was loaded"))
    refused = command("export", run, "--to", *options, "--output", tmp_path / "out", code=2)
    assert words in refused
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["gguf", "ollama"])
def test_a_model_with_a_head_is_no_gguf(classes: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(UserError, match="a GGUF holds a model that predicts tokens"):
        export_run(classes, to, tmp_path / "out")


def test_a_template_that_ollama_cannot_have_is_refused(run: Path, tmp_path: Path, command) -> None:
    tokenizer = open_run(run).tokenizer
    (tmp_path / "own.jinja").write_text(tokenizer.chat_template + "{{ 'Answer:' }}")
    recipe = (run / "recipe.yaml").read_text()
    own = tmp_path / "run"
    subprocess.run(["cp", "-r", run, own], check=True)
    changed = json.dumps(str(tmp_path / "own.jinja"))
    lines = [
        f"  chat_template: {changed}" if "chat_template:" in line else line
        for line in recipe.splitlines()
    ]
    (own / "recipe.yaml").write_text("\n".join(lines) + "\n")
    (own / "checksums.json").unlink()  # of the recipe that was
    refused = command("export", own, "--to", "ollama", "--output", "out", code=2)
    assert "marks turns in a way that is not known here" in refused


@pytest.mark.parametrize(("to", "module"), [("gguf", "xllamacpp"), ("peft", "peft")])
def test_a_consumer_that_is_not_installed_is_named(
    run: Path, tmp_path: Path, monkeypatch, to: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(
        llama_cpp.importlib.util, "find_spec", lambda name: None if name == module else name
    )
    with pytest.raises(UserError, match=f"pip install {module}, or export with --no-verify"):
        export_run(run, to, tmp_path / "out")


def test_the_proof_takes_less_where_fp32_does_not_fit(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    numbers = 6_390_000  # of the tiny model
    beside = exports.consumer_dtype.__globals__["BESIDE_BYTES"]
    assert hardware.available_bytes(torch.device("cpu")) > beside
    monkeypatch.setattr(exports, "available_bytes", lambda device: beside + 3 * numbers)
    proof = export_run(run, "hf", tmp_path / "out")
    assert proof is not None
    assert (proof.computed_in, proof.tolerance) == ("bf16", parity.COMPUTED_IN_BF16)
    assert proof.relative_difference > 1e-3
    monkeypatch.setattr(exports, "available_bytes", lambda device: beside + numbers)
    with pytest.raises(UserError, match=r"needs .* GiB of memory.*give --no-verify"):
        export_run(run, "hf", tmp_path / "no")
    assert export_run(run, "hf", tmp_path / "yes", verify=False) is None
