"""A folder of safetensors: every file and tensor is found once, inside the folder, or named."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamaweft.errors import UserError
from llamaweft.model.folder import checked_tensors, read_config
from llamaweft.model.llama import empty_causal_lm

NORM = "model.norm.weight"


@pytest.fixture
def sharded(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model in two files and an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(tiny_folder / "config.json", folder)
    tensors = load_file(tiny_folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for index in range(2):
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        held = {name: tensors[name] for name in names[index::2]}
        save_file(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def read(folder: Path) -> int:
    config = read_config(folder)
    return len(list(checked_tensors(folder, empty_causal_lm(config), config)))


def refused(folder: Path, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        read(folder)
    assert str(folder) in str(error.value)


def test_all_tensors_are_found_in_their_files(sharded):
    assert read(sharded) == len(weight_map(sharded))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../model.safetensors", "names a file outside its folder"),
        ("/tmp/model.safetensors", "names a file outside its folder"),
        ("sub/model.safetensors", "names a file outside its folder"),
        ("..\\model.safetensors", "names a file outside its folder"),
        ("C:model.safetensors", "names a file outside its folder"),
        ("..", r"is no \.safetensors file"),
        ("", r"is no \.safetensors file"),
        ("config.json", r"is no \.safetensors file"),
        ("gone.safetensors", "gone.safetensors is missing"),
    ],
)
def test_an_index_names_files_of_its_folder_only(sharded, tmp_path, name, says):
    save_file({NORM: torch.ones(64)}, tmp_path / "model.safetensors")
    write_index(sharded, weight_map(sharded) | {NORM: name})
    refused(sharded, says)


@pytest.mark.parametrize(
    "content",
    [{}, {"weight_map": []}, {"weight_map": {"a": 1, "b": "x"}}, {"weight_map": {"a": []}}, []],
)
def test_an_index_that_is_none_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(sharded, "cannot be read")


def test_an_index_of_numbers_or_nothing_or_endless_brackets_is_refused(sharded):
    write_index(sharded, {"a": 1})
    refused(sharded, r"names 1, which is no \.safetensors file")
    write_index(sharded, {})
    refused(sharded, "names no file")
    (sharded / "model.safetensors.index.json").write_text("[" * 200_000)
    refused(sharded, "cannot be read")


def test_a_tensor_twice_is_named_with_both_files(sharded):
    second = sharded / "model-00002-of-00002.safetensors"
    first = load_file(sharded / "model-00001-of-00002.safetensors")
    name = min(first)
    save_file(load_file(second) | {name: first[name]}, second)
    refused(sharded, rf"00002-of-00002\.safetensors holds {name}, and so does .*00001-of-00002")


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.ones(65), rf"{NORM} has shape \(65,\), but config.json says \(64,\)"),
        (torch.ones(64, 1), r"has shape \(64, 1\)"),
        (torch.tensor(1.0), r"has shape \(\)"),
        (torch.ones(64).double(), f"{NORM} holds F64"),
        (torch.ones(64).to(torch.int8), f"{NORM} holds I8"),
        (torch.ones(64).to(torch.float8_e4m3fn), f"{NORM} holds F8_E4M3"),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_named(sharded, tensor, says):
    path = sharded / weight_map(sharded)[NORM]
    save_file(load_file(path) | {NORM: tensor}, path)
    refused(sharded, says)


def test_cut_files_are_named(sharded):
    path = sharded / "model-00002-of-00002.safetensors"
    whole = path.read_bytes()
    for keep in (0, 4, 20, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"00002-of-00002\.safetensors"):
            read(sharded)


def test_a_name_of_several_lines_is_refused_in_one(sharded):
    path = sharded / weight_map(sharded)[NORM]
    save_file(load_file(path) | {"a\nerror: b": torch.ones(2)}, path)
    refused(sharded, r"holds the name 'a\\nerror: b', which cannot be shown")


def _claims(**entry: object) -> bytes:
    text = json.dumps({NORM: {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]} | entry})
    return struct.pack("<Q", len(text)) + text.encode() + bytes(256)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        _claims(data_offsets=[0, 2**60]),
        _claims(data_offsets=[256, 0]),
        _claims(shape=[2**62]),
        _claims(shape=[-1]),
        _claims(dtype="X9"),
    ],
)
def test_a_header_that_claims_too_much_is_refused(sharded, content):
    (sharded / "model-00001-of-00002.safetensors").write_bytes(content)
    refused(sharded, "cut short or damaged")


def test_a_folder_in_place_of_a_file_is_refused(sharded):
    path = sharded / "model-00001-of-00002.safetensors"
    path.unlink()
    path.mkdir()
    refused(sharded, "cannot be read|damaged")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, "no more than 4096"),
        ({"vocab_size": 2**40}, "vocab_size is '1099511627776'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is 'nan'"),
        ({"rope_theta": float("inf"), "rope_parameters": None}, "rope_theta is 'inf'"),
    ],
)
def test_a_config_that_claims_too_much_is_refused(sharded, change, says):
    content = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(content | change))
    refused(sharded, says)


def test_a_config_of_endless_brackets_is_refused(sharded):
    (sharded / "config.json").write_text("[" * 200_000)
    refused(sharded, "cannot be read")
