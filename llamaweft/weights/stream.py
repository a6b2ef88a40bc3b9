"""Getting the frozen weights of a layer there in time.

The model calls `before(layer, step)` when it comes to a layer, with step +1 in the forward and -1
in the backward pass: that layer must be readable afterwards, and layer + step is fetched meanwhile.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from llamaweft.weights.frozen import FrozenWeight
from llamaweft.weights.store import Store


class Stream(Protocol):
    def before(self, layer: int, step: int) -> None:
        """`layer` is about to be used, and `layer + step` after it."""


class Resident:
    """All weights are where they are needed."""

    def before(self, layer: int, step: int) -> None:
        pass


class MappedStream:
    """Weights in a mapped file: the system is asked to read the next layer ahead. Pages that were
    used may be dropped by the system, so memory of the machine is needed for two layers only."""

    def __init__(self, store: Store, names: list[list[str]]) -> None:
        """names: the tensors of each layer."""
        self.store, self.names = store, names

    def before(self, layer: int, step: int) -> None:
        if 0 <= layer + step < len(self.names):
            self.store.will_need(self.names[layer + step])


class DeviceStream:
    """Weights in pinned memory of the host, copied to a GPU layer by layer.

    Two layers are on the device: the one that is computed with and the next one, which a stream of
    its own copies meanwhile. Events keep a slot from being overwritten while it is read.
    """

    def __init__(self, layers: list[list[FrozenWeight]], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.host = [[_pinned(weight.parts) for weight in layer] for layer in layers]
        self.copies = torch.cuda.Stream(device)
        self.slots: list[list[dict[str, Tensor]]] = [_room(self.host, device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]
        self.copied: list[Any] = [torch.cuda.Event(), torch.cuda.Event()]
        self.used: list[Any] = [torch.cuda.Event(), torch.cuda.Event()]

    def before(self, layer: int, step: int) -> None:
        slot = self._fetch(layer)
        torch.cuda.current_stream(self.device).wait_event(self.copied[slot])
        for weight, parts in zip(self.layers[layer], self.slots[slot], strict=True):
            weight.place(parts)
        other = 1 - slot
        if 0 <= layer + step < len(self.layers):
            # What is queued so far may still read the other slot: it was the layer before.
            self.used[other].record(torch.cuda.current_stream(self.device))
            self._fetch(layer + step, other)

    def _fetch(self, layer: int, slot: int | None = None) -> int:
        """Start copying a layer, unless a slot has it; returns its slot."""
        if layer in self.holds:
            return self.holds.index(layer)
        slot = 0 if slot is None else slot
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(self.used[slot])
            for parts, held in zip(self.slots[slot], self.host[layer], strict=True):
                for name, values in held.items():
                    parts[name].copy_(values, non_blocking=True)
            self.copied[slot].record(self.copies)
        self.holds[slot] = layer
        return slot


def _pinned(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.contiguous().pin_memory() for name, part in parts.items()}


def _room(host: list[list[dict[str, Tensor]]], device: torch.device) -> list[dict[str, Tensor]]:
    """Device memory for the parts of one layer; all layers have the same shapes."""
    return [
        {name: torch.empty_like(part, device=device) for name, part in held.items()}
        for held in host[0]
    ]
