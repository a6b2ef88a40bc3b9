"""The store: what is written is what is read, and what was changed is never trained on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llamaweft.errors import UserError
from llamaweft.model.folder import read_config
from llamaweft.model.init import init_random
from llamaweft.model.load import load_causal_lm
from llamaweft.model.stores import cached_store, open_store
from llamaweft.weights import build
from llamaweft.weights.build import Source, write_store
from llamaweft.weights.codecs import CODECS, decode
from llamaweft.weights.frozen import encode
from llamaweft.weights.store import DamagedStoreError, Store

NAME = "model.layers.0.mlp.up_proj.weight"


def sources(seed: int = 0) -> tuple[list[Source], dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    tensors = {NAME: torch.randn(100, 128), "model.norm.weight": torch.randn(128)}
    tensors["lm_head.weight"] = torch.randn(50, 128)
    return [Source(n, tuple(t.shape), t.split) for n, t in tensors.items()], tensors


@pytest.mark.parametrize("codec", CODECS)
def test_it_holds_what_the_codec_makes(codec: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(build, "CHUNK_BYTES", 4 * 128 * 7)  # seven rows at a time
    made, tensors = sources()
    write_store(tmp_path / "store", codec, made, "test")
    store = Store(tmp_path / "store")
    expected = decode(codec, encode(codec, tensors[NAME]), torch.float32)
    assert torch.equal(store.matrix(NAME).dequantised(), expected)
    assert torch.equal(store.vector("model.norm.weight"), tensors["model.norm.weight"])
    assert store.matrix("lm_head.weight").codec == ("int8" if codec == "nf4" else codec)


def test_the_file_is_a_safetensors_file(tmp_path: Path) -> None:
    made, tensors = sources()
    write_store(tmp_path / "store", "nf4", made, "test")
    with safe_open(tmp_path / "store/weights.safetensors", "pt") as file:
        found = file.get_tensor(f"{NAME}.codes")
        assert torch.equal(found, encode("nf4", tensors[NAME])["codes"])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", "nf4", sources()[0], "test")
    return tmp_path / "store"


def test_a_changed_byte_is_found_at_the_first_read(store: Path) -> None:
    with (store / "weights.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    opened = Store(store)  # the start reads no weights
    damaged = opened.index["tensors"]
    errors = []
    for name in damaged:
        try:
            opened.verify(name)
        except DamagedStoreError as error:
            errors.append((name, str(error)))
    assert len(errors) == 1
    name, message = errors[0]
    assert name in message
    assert "delete" in message
    with pytest.raises(DamagedStoreError):
        opened.matrix(name).linear(torch.zeros(1, 128))


def test_a_store_cut_short_of_another_version_or_without_header_is_refused(store: Path) -> None:
    data, index = store / "weights.safetensors", store / "store.json"
    whole, text = data.read_bytes(), index.read_text()
    data.write_bytes(whole[:-1])
    with pytest.raises(DamagedStoreError, match="cut short"):
        Store(store)
    data.write_bytes(b"\xff" * 100 + whole[100:])
    with pytest.raises(DamagedStoreError, match="header"):
        Store(store)
    data.write_bytes(whole)
    index.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(DamagedStoreError, match="version 99"):
        Store(store)
    index.write_text(text[:50])
    with pytest.raises(DamagedStoreError, match="cannot be read"):
        Store(store)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("store.json", b'"checksums"', b'"chgcksums"'),
        ("store.json", b'"codes": "', b'"codgs": "'),
        ("weights.safetensors", b'"dtype": "U8"', b'"dtype": "I8"'),
        ("weights.safetensors", b'"data_offsets"', b'"data_offsgts"'),
        ("weights.safetensors", b'"data_offsets": [0,', b'"data_offsets": [8,'),
    ],
)
def test_a_list_with_a_flipped_bit_is_found_at_the_opening(
    store: Path, file: str, old: bytes, new: bytes
) -> None:
    content = (store / file).read_bytes()
    assert old in content
    (store / file).write_bytes(content.replace(old, new, 1))
    with pytest.raises(DamagedStoreError, match="does not have the header"):
        Store(store)


def test_the_cache_makes_a_damaged_or_outdated_store_again(tiny_folder: Path, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    first = open_store(folder, "int8")
    place = cached_store(folder, "int8")
    written = (place / "store.json").stat().st_mtime_ns
    open_store(folder, "int8")
    assert (place / "store.json").stat().st_mtime_ns == written  # made once
    (place / "weights.safetensors").write_bytes(b"short")
    again = open_store(folder, "int8")
    assert again.index["tensors"] == first.index["tensors"]
    init_random("tiny", tmp_path / "other", "builtin:smollm2-135m", "fp32", seed=2)
    shutil.copy(tmp_path / "other/model.safetensors", folder / "model.safetensors")
    other = open_store(folder, "int8")
    assert other.index["source"] != first.index["source"]
    assert other.index["tensors"] != first.index["tensors"]


def test_a_model_folder_may_hold_its_weights_in_a_store_alone(tmp_path: Path) -> None:
    folder = tmp_path / "random"
    init_random("tiny", folder, "builtin:smollm2-135m", "nf4", seed=3)
    assert not list(folder.glob("*.safetensors"))
    model = load_causal_lm(folder, base_weights="nf4")
    w = model.model.layers[0].mlp.up_proj.weight.dequantised()
    assert 0.018 < float(w.std()) < 0.022
    with pytest.raises(UserError, match="holds its weights in nf4 only"):
        load_causal_lm(folder, base_weights="int8")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 192}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(folder).intermediate_size == 192
    with pytest.raises(DamagedStoreError, match="store of another model"):
        load_causal_lm(folder, base_weights="nf4")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which needs root")
def test_a_disk_that_fills_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)])
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        big = torch.randn(1000, 1280)
        source = Source(NAME, (1000, 1280), big.split)
        with pytest.raises(UserError, match=r"MiB free.*store of the weights"):
            write_store(small / "store", "bf16", [source], "test")
        monkeypatch.setattr(build, "need_disk", lambda *a: None)
        with pytest.raises(UserError, match="No space left"):
            write_store(small / "store", "bf16", [source], "test")
        assert not any(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)
