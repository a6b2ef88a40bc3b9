"""The formulae of plan/communication.py against what the engine gives to torch.distributed: one
optimizer step of the tiny model, on two and four processes over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from collectives import CountedCollectives

from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig, inject
from llamaweft.data.chat import Document
from llamaweft.model.folder import read_config
from llamaweft.model.llama import Memory
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.parallel.layout import Layout
from llamaweft.parallel.ranks import Ranks
from llamaweft.parallel.spread import spread
from llamaweft.plan.communication import HOST_COPY, communication
from llamaweft.plan.memory import Workload, schedule
from llamaweft.plan.rank import of_rank
from llamaweft.plan.time import StepWork

TOKENS, PACKS, R = 50, 2, 4
LABELS = 20
"""Of a pack, all different positions."""

LAYOUTS = {
    2: [Layout(data=2), Layout(shard=2), Layout(tensor=2)],
    4: [
        Layout(data=2, shard=2),
        Layout(data=2, tensor=2),
        Layout(shard=2, tensor=2),
        Layout(shard=4),
    ],
}
METHODS = [("lora", "fp32"), ("lora", "bf16"), ("none", "fp32")]
CODED = [Layout(shard=2), Layout(shard=2, offload=True)]
CASES = {
    world: [
        (layout, method, codec, kept)
        for layout in layouts
        for method, codec in METHODS
        for kept in (True, False)
    ]
    for world, layouts in LAYOUTS.items()
}
CASES[2] += [(layout, "lora", codec, True) for layout in CODED for codec in ("nf4", "int8")]
CASES[2] += [(Layout(shard=2, offload=True), "none", "fp32", True)]
CASES[4] += [(Layout(shard=4), "lora", codec, False) for codec in ("nf4", "int8")]


def pack() -> Pack:
    ids = np.arange(3, 3 + TOKENS, dtype=np.int32)
    weights = np.zeros(TOKENS, np.float32)
    weights[-LABELS:] = 1
    return Pack.from_documents([Document(ids, weights, "")])


def workload(folder: Path, method: str) -> Workload:
    return Workload(
        config=read_config(folder),
        pack_tokens=TOKENS,
        labels=LABELS,
        rank=R if method == "lora" else None,
        targets=LAYER_LINEARS if method == "lora" else (),
        compute_bytes=4,
        runtime_bytes=0,
    )


def _start(rank: int, world: int, tiny: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = [_counted(tiny, rank, *case) for case in CASES[world]]
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def _counted(
    tiny: Path, rank: int, layout: Layout, method: str, codec: str, kept: bool
) -> dict[str, int]:
    """Payload of the second of two steps, by kind."""
    model = load_causal_lm(tiny, base_weights=codec if method == "lora" else None)
    if method == "lora":
        inject(model, LoraConfig(r=R, target_modules=LAYER_LINEARS))
    ranks = Ranks(layout, rank)
    spread(model, ranks)
    layers = model.config.num_hidden_layers
    keep = Memory.all_kept(layers).keep if kept else [frozenset()] * layers
    model.model.memory = Memory(keep)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        for parameter in trained.values():
            parameter.grad = None
        with CountedCollectives() as counted:
            for _ in range(PACKS):
                model.loss(pack())[0].backward()
            ranks.sum_gradients(trained)
    kinds = {call.kind for call in counted.calls}
    return {kind: counted.payload_bytes(kind) for kind in kinds}


def _planned(tiny: Path, layout: Layout, method: str, codec: str, kept: bool) -> dict[str, float]:
    work = of_rank(workload(tiny, method), layout, codec, mapped=True)
    layers = work.config.num_hidden_layers
    made = schedule(work, [work.keepable if kept else ()] * layers)
    step = StepWork(TOKENS * PACKS, LABELS * PACKS, 0, PACKS)
    found: dict[str, float] = {}
    for transfer in communication(work, layout, made, codec, step):
        if transfer.kind == HOST_COPY:  # no collective
            continue
        found[transfer.kind] = found.get(transfer.kind, 0.0) + transfer.payload_bytes
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_planned_is_what_is_sent(world: int, tiny_folder: Path, tmp_path: Path) -> None:
    """Within 5%: parts may be padded to equal size."""
    mp.spawn(_start, args=(world, tiny_folder, tmp_path), nprocs=world)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    for counted in ranks:
        for case, sent in zip(CASES[world], counted, strict=True):
            planned = _planned(tiny_folder, *case)
            assert planned.keys() == sent.keys(), case
            for kind, size in planned.items():
                assert sent[kind] == pytest.approx(size, rel=0.05), (case, kind)
