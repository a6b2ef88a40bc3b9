"""Hugging Face folders with pickled weights: read once, guarded, and used as safetensors."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llamaweft.errors import UserError
from llamaweft.model.convert import convert
from llamaweft.model.load import load_causal_lm
from llamaweft.model.locate import find_folder
from llamaweft.model.tokenizer import load_tokenizer


def pickled(folder: Path, target: Path, files: int = 1) -> Path:
    """The model in `folder` with its weights in pytorch_model.bin, or several and an index."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
    tensors = load_file(folder / "model.safetensors")
    if files == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    names = sorted(tensors)
    weight_map = {}
    for index in range(files):
        name = f"pytorch_model-{index + 1:05d}-of-{files:05d}.bin"
        held = {key: tensors[key] for key in names[index::files]}
        weight_map |= dict.fromkeys(held, name)
        torch.save(held, target / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("files", [1, 3])
def test_it_is_the_same_model(tiny_folder, tmp_path, monkeypatch, files):
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))
    source = pickled(tiny_folder, tmp_path / "old", files)
    (source / "evil.py").write_text("raise SystemExit")
    folder = find_folder(str(source))
    assert find_folder(str(source)) == folder
    expected = load_file(tiny_folder / "model.safetensors")
    loaded = dict(load_causal_lm(folder, base_weights=None).named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert load_tokenizer(folder)("a b c") == load_tokenizer(tiny_folder)("a b c")
    assert not list(folder.glob("*.py"))
    assert not list(folder.glob("*.bin*"))


def test_safetensors_are_taken_where_both_are(tiny_folder, tmp_path):
    source = pickled(tiny_folder, tmp_path / "both")
    shutil.copy(tiny_folder / "model.safetensors", source)
    assert find_folder(str(source)) == source
    with pytest.raises(UserError, match="nothing to convert"):
        convert(source, tmp_path / "new")


class Calls:
    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_code_in_weights_does_not_run(tiny_folder, tmp_path):
    source = pickled(tiny_folder, tmp_path / "evil")
    marker = tmp_path / "ran"
    torch.save({"x": Calls(os.system, f"touch {marker}")}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="never run"):
        find_folder(str(source))
    assert not marker.exists()


def test_what_does_not_fit_is_named(tiny_folder, tmp_path):
    source = pickled(tiny_folder, tmp_path / "old")
    path = source / "pytorch_model.bin"
    tensors = load_file(tiny_folder / "model.safetensors")
    norm = "model.norm.weight"
    cases = {
        f"lacks the tensor {norm}": {k: v for k, v in tensors.items() if k != norm},
        "holds x, which a 2-layer Llama does not": tensors | {"x": torch.ones(2)},
        f"{norm} has shape": tensors | {norm: torch.ones(3)},
    }
    for says, content in cases.items():
        torch.save(content, path)
        with pytest.raises(UserError, match=says):
            convert(source, tmp_path / "new")
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../out.bin", "/tmp/out.bin", "a\\out.bin", "x.txt"])
def test_an_index_cannot_name_what_is_outside(tiny_folder, tmp_path, name):
    source = pickled(tiny_folder, tmp_path / "old", files=2)
    index = source / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    torch.save({"model.norm.weight": torch.ones(64)}, tmp_path / "out.bin")
    with pytest.raises(UserError, match=r"outside its folder|is no \.bin file"):
        convert(source, tmp_path / "new")


def test_a_tokenizer_that_would_be_ignored_is_refused(tiny_folder, tmp_path):
    source = pickled(tiny_folder, tmp_path / "old")
    with pytest.raises(UserError, match="has its own tokenizer; remove --tokenizer"):
        convert(source, tmp_path / "new", "builtin:smollm2-135m")
    with pytest.raises(UserError, match="there is no"):
        convert(tmp_path / "nowhere", tmp_path / "new")
