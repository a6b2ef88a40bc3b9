"""No rank holds a whole model on the way to its part of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llamaweft.model.folder import read_config
from llamaweft.model.init import random_tensors
from llamaweft.model.load import load_causal_lm
from llamaweft.model.presets import PRESETS
from llamaweft.model.save import write_model
from llamaweft.parallel.layout import Layout
from llamaweft.parallel.ranks import Ranks
from llamaweft.parallel.spread import spread
from llamaweft.runtime import anon_bytes, return_freed_memory

WIDE = replace(
    PRESETS["tiny"],
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=64,
)
LAYOUTS = [Layout(shard=2), Layout(tensor=2)]


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 50 million weights in bf16."""
    folder = tmp_path_factory.mktemp("wide")
    tensors = random_tensors(WIDE, seed=1)
    write_model(folder, WIDE, tensors, lambda to: None, dtype=torch.bfloat16)
    return folder


def _start(rank: int, layout: Layout, model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    return_freed_memory()
    store = dist.FileStore(str(folder / "store"), layout.world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.world)
    before = anon_bytes()
    loaded = load_causal_lm(model, base_weights=None, in_parts=True)
    read = anon_bytes() - before
    spread(loaded, Ranks(layout, rank))
    dtypes = {str(parameter.dtype) for parameter in loaded.parameters()}
    found = {"read": read, "held": anon_bytes() - before, "dtypes": sorted(dtypes)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_never_holds_a_whole_model(
    layout: Layout, wide_folder: Path, tmp_path: Path
) -> None:
    config = read_config(wide_folder)
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    whole = 4 * config.num_hidden_layers * layer
    mp.spawn(_start, args=(layout, wide_folder, tmp_path), nprocs=layout.world)
    for rank in range(layout.world):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["read"] < 0.1 * whole
        assert 0.4 * whole < found["held"] < 0.75 * whole
        assert found["dtypes"] == ["torch.float32"]
