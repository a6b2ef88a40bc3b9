"""A layer that is run for its time does what a layer of a step does."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from llamaweft.adapters.lora import LAYER_LINEARS, LoraConfig, inject, lora_layers
from llamaweft.data.chat import Document
from llamaweft.model import speed
from llamaweft.model.pack import Pack
from llamaweft.model.presets import PRESETS
from llamaweft.plan.memory import KEEPABLE
from llamaweft.weights.frozen import FrozenWeight

CONFIG = replace(PRESETS["tiny"], vocab_size=40_000)


@pytest.fixture
def pack() -> Pack:
    ids = np.arange(24, dtype=np.int32)
    return Pack.from_documents([Document(ids, np.ones(24, np.float32), "")])


def measured(pack: Pack, codec: str | None = "nf4", adapt=lambda model: None, heads: bool = True):
    return speed.layer_seconds(
        CONFIG,
        pack,
        576,
        10,
        codec=codec,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
        adapt=adapt,
        keepable=[name for name in KEEPABLE if name not in ("o_proj", "down_proj")],
        mlp_tile_tokens=1024,
        predicts_tokens=heads,
    )


def test_every_product_is_made_once_forward_once_backward_and_what_is_not_kept_again(
    pack: Pack, monkeypatch
) -> None:
    """Seven matrices: with all kept 7 and 7; with nothing kept those before down_proj again."""
    calls: list[str] = []
    linear, backward = FrozenWeight.linear, FrozenWeight.linear_backward
    monkeypatch.setattr(
        FrozenWeight, "linear", lambda self, x: (calls.append("forward"), linear(self, x))[1]
    )
    monkeypatch.setattr(
        FrozenWeight,
        "linear_backward",
        lambda self, g: (calls.append("backward"), backward(self, g))[1],
    )
    counted: list[tuple[int, int]] = []

    def once(run, device) -> float:
        calls.clear()
        run()
        counted.append((calls.count("forward"), calls.count("backward")))
        return 1.0

    monkeypatch.setattr(speed, "_median_seconds", once)
    measured(pack)
    assert counted[:2] == [(7, 7), (7 + 6, 7)]


@pytest.fixture
def gradients(monkeypatch) -> list[int]:
    """How many parameters have one, each time that they are forgotten."""
    counted: list[int] = []
    monkeypatch.setattr(
        torch.nn.Module,
        "zero_grad",
        lambda self, set_to_none=True: counted.append(
            sum(p.grad is not None for p in self.parameters())
        ),
    )
    return counted


def test_the_adapter_is_in_it_and_gets_its_gradient(pack: Pack, gradients: list[int]) -> None:
    models: list = []

    def adapt(model) -> None:
        inject(model, LoraConfig(4, 8, 0.0, False, LAYER_LINEARS))
        models.append(model)

    measured(pack, adapt=adapt)
    assert len(lora_layers(models[0])) == 7
    assert gradients[0] == 14


def test_trained_weights_get_their_gradients(pack: Pack, gradients: list[int]) -> None:
    measured(pack, codec=None)
    assert gradients[0] == 9  # seven matrices and two norms
    assert gradients[-1] == 1  # the head


def test_the_head_counts_by_its_rows_and_its_labels(pack: Pack, monkeypatch) -> None:
    """Of 40,000 rows 16,384 are run, with 10 labels."""
    monkeypatch.setattr(speed, "_median_seconds", lambda run, device: 3.0)
    assert measured(pack).label == pytest.approx(3.0 * 40_000 / 16_384 / 10)
    assert measured(pack, heads=False).label == 0


def test_the_median_leaves_out_the_first_run(monkeypatch) -> None:
    clock = itertools.chain([0.0, 0.4, 1.0, 1.2], itertools.count(3.0))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    runs: list[int] = []
    assert speed._median_seconds(lambda: runs.append(1), torch.device("cpu")) == pytest.approx(0.3)
    assert len(runs) == 3
