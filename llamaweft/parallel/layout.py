"""How the processes of a run divide its work: a mesh of data x shard x tensor.

data: each replica has its own packs. shard: weights are held in parts and gathered layer by layer
(FSDP2: Zhao et al., 2023), and each rank has packs of its own too. tensor: each matrix is cut, and
ranks work on the same packs (Shoeybi et al., 2019: Megatron-LM).

Ranks are counted in that order, tensor fastest: neighbours share the fastest links.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llamaweft.errors import UserError
from llamaweft.model.presets import LlamaConfig
from llamaweft.settings import Parallel

DIMENSIONS = ("data", "shard", "tensor")


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's dimensions. offload: whether sharded states lie in the host's memory."""

    data: int = 1
    shard: int = 1
    tensor: int = 1
    offload: bool = False

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.data * self.shard * self.tensor

    @property
    def pack_ranks(self) -> int:
        """How many different packs are computed at once."""
        return self.data * self.shard

    def place(self, rank: int) -> Place:
        """Where a rank stands in the mesh."""
        rest, tensor = divmod(rank, self.tensor)
        data, shard = divmod(rest, self.shard)
        return Place(data, shard, tensor)

    @classmethod
    def named(cls, keys: Parallel) -> Layout:
        """The mesh of a recipe's keys."""
        return cls(keys.data, keys.shard, keys.tensor, keys.offload)

    @property
    def sizes(self) -> str:
        """Every dimension, for a sentence that says why they do not fit."""
        return " x ".join(f"{name} {getattr(self, name)}" for name in DIMENSIONS)

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in DIMENSIONS}
        named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        return (" x ".join(named) or "one process") + ", offloaded" * self.offload


@dataclass(frozen=True)
class Place:
    """Coordinates of a rank."""

    data: int
    shard: int
    tensor: int


def check_world(layout: Layout, world: int) -> None:
    """Raises UserError where the mesh has not as many places as there are processes."""
    if layout.world == world:
        return
    raise UserError(
        f"parallel: {layout.sizes} is {layout.world} processes, and {world} "
        f"{'was' if world == 1 else 'were'} started; start {layout.world} with --nproc "
        f"{layout.world}, or change parallel"
    )


def check_model(layout: Layout, config: LlamaConfig) -> None:
    """Raises UserError where a model cannot be cut in so many parts."""
    widths = {
        "num_key_value_heads": config.num_key_value_heads,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    for name, width in widths.items():
        if width % layout.tensor:
            raise UserError(
                f"parallel.tensor: {layout.tensor} does not divide the model's {name}, {width}; "
                f"it may be {_divisors(widths)}"
            )


def _divisors(widths: dict[str, int]) -> str:
    common = math.gcd(*widths.values())
    found = [str(size) for size in range(1, common + 1) if common % size == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else "1 only"


def check_packs(layout: Layout, accumulation: int, packs: int) -> None:
    """Raises UserError where ranks would never have a pack to compute.

    accumulation: packs in an optimizer step. packs: in the whole run.
    """
    if layout.pack_ranks > packs:
        raise UserError(
            f"parallel: {layout.pack_ranks} ranks have packs of their own, and the run has "
            f"{packs} of them; use fewer ranks, lower training.micro_batch_tokens or give more rows"
        )
    if layout.pack_ranks > accumulation:
        raise UserError(
            f"parallel: {layout.pack_ranks} ranks have packs of their own, and a step has "
            f"training.gradient_accumulation_steps: {accumulation} over all ranks together; set it "
            f"to {layout.pack_ranks} or a multiple, or use fewer ranks"
        )
