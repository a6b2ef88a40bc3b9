"""The optimizer in the backward pass, against the same loop with the step after it: bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import documents, loop_over

from llamaweft.adapters.lora import LoraConfig, inject
from llamaweft.data.chat import Document
from llamaweft.model.llama import Memory
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.train.events import StepEnded
from llamaweft.train.in_backward import InBackward
from llamaweft.train.optim import build_optimizer, trained_parameters

LONG = Document(np.arange(5, 105, dtype=np.int32), np.ones(100, np.float32), "")


def run(folder: Path, tmp_path: Path, name: str, method: str, fused: bool, keep: Memory):
    """Three steps on packs of which one is longer than a tile of the MLP: weights, losses and
    norms, and how many gradients were there when the backward pass ended."""
    steps = [[Pack.from_documents([document])] for document in (LONG, *documents()[:2])]
    loop, seen = loop_over(steps, folder, tmp_path)
    if method != "full":
        torch.manual_seed(0)
        loop.model = load_causal_lm(folder, base_weights="fp32")
        inject(loop.model, LoraConfig(r=4, use_dora=method == "dora"))
        loop.parameters, loop.objective = trained_parameters(loop.model), loop.model.loss
    loop.model.model.memory = keep
    loop.optimizer = build_optimizer(
        name, loop.parameters, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8
    )
    left = []
    if fused:
        tiling = loop.model.model.tiling
        loop.in_backward = InBackward(loop.optimizer, loop.parameters, lambda: tiling.goes_on)
        norm = loop.in_backward.norm

        def counted() -> float:
            left.append(sum(p.grad is not None for p in loop.parameters.values()))
            return norm()

        loop.in_backward.norm = counted
    before = {name: p._version for name, p in loop.parameters.items()}
    loop.run()
    assert all(p._version >= before[name] + 3 for name, p in loop.parameters.items())
    said = [(e.loss, e.grad_norm, e.lr) for e in seen if isinstance(e, StepEnded)]
    return {n: p.detach() for n, p in loop.parameters.items()}, said, left


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("method", ["full", "tied", "lora", "dora"])
def test_the_numbers_are_those_of_a_step_after_the_backward_pass(
    tiny_folder: Path, tied_folder: Path, tmp_path: Path, method: str, name: str, kept: bool
) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    folder = tied_folder if method == "tied" else tiny_folder
    method = "full" if method == "tied" else method
    names = Memory.all_kept(2).keep if kept else [frozenset[str]()] * 2
    keep = Memory(names, mlp_tile_tokens=32)
    usual, said, _ = run(folder, tmp_path / "usual", name, method, False, keep)
    fused, fused_said, left = run(folder, tmp_path / "fused", name, method, True, keep)
    assert fused_said == said
    assert all(torch.equal(fused[key], usual[key]) for key in usual)
    assert left == [0, 0, 0]
