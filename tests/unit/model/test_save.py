"""Model folders are written a few rows at a time, and safetensors reads them as if it had written
them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llamaweft.model import save
from llamaweft.model.init import random_tensors
from llamaweft.model.presets import PRESETS
from llamaweft.model.save import write_model
from llamaweft.weights import build
from llamaweft.weights.build import Source

CONFIG = PRESETS["tiny"]


def sources(tensors: dict[str, torch.Tensor], asked: list[int]) -> list[Source]:
    """Tensors as sources that note how many rows at once they are asked for."""

    def chunks(tensor: torch.Tensor, rows: int) -> list[torch.Tensor]:
        asked.append(rows)
        return list(tensor.split(rows))

    return [
        Source(name, tuple(t.shape), lambda rows, t=t: chunks(t, rows))
        for name, t in tensors.items()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [50_000, 2 * 10**9])
def test_rows_make_the_folder_that_whole_tensors_make(
    tmp_path: Path, monkeypatch, dtype: torch.dtype, shard_bytes: int
) -> None:
    monkeypatch.setattr(save, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(build, "CHUNK_BYTES", 4 * 64 * 5)  # five rows of the narrow matrices
    tensors = dict(random_tensors(CONFIG, seed=2))
    asked: list[int] = []
    for name, given in (("rows", sources(tensors, asked)), ("whole", tensors.items())):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, CONFIG, given, lambda folder: None, dtype=dtype)
    assert {5, 2} <= set(asked)  # rows of 64 and of 128 numbers
    names = sorted(path.name for path in (tmp_path / "rows").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    found = {}
    for path in (tmp_path / "rows").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
        found |= load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].to(dtype)) for name in tensors)
    index = tmp_path / "rows/model.safetensors.index.json"
    assert index.exists() == (shard_bytes < 10**6)
    if index.exists():
        total = json.loads(index.read_text())["metadata"]["total_size"]
        assert total == dtype.itemsize * sum(t.numel() for t in tensors.values())


def test_a_source_that_gives_too_few_rows_is_no_model(tmp_path: Path) -> None:
    short = Source("model.norm.weight", (64,), lambda rows: [torch.ones(63)])
    with pytest.raises(AssertionError, match="252 bytes of numbers, and the header says 256"):
        write_model(tmp_path, CONFIG, [short], lambda folder: None, dtype=torch.float32)
