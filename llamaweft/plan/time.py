"""Seconds of a step from its arithmetic and its traffic, and from what a device does in a second.

Where a layer of the model was run on the device (model/speed.py), a step is so many layers and a
head. Otherwise six kinds of work have a rate each: the base's products (with decoding, as the
codec needs it), attention, the adapter's narrow products, elementwise work, the optimizer, and
calling all of it. Attention and narrow products are taken at a share of the plain product's rate.

T: tokens of a step   L: tokens of one document   r: LoRA's rank   c: bytes of a computed number
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llamaweft.plan.flops import layer_flops, middle_layer_flops, training_flops
from llamaweft.plan.memory import (
    Schedule,
    Workload,
    held_parameter_count,
    most_recomputed_share,
)
from llamaweft.plan.shapes import LINEARS, sizes
from llamaweft.plan.whole import Whole

ATTENTION_SHARE, NARROW_SHARE = 0.4, 0.5
"""Of the plain product's rate: what attention's products and the adapter's reach (docs/plan.md)."""

HIDDEN_PASSES, HEAD_PASSES, INNER_PASSES = 60, 16, 30
"""Numbers read or written by elementwise work in one layer's step, for each token: so many times
the hidden size (norms, residuals, their gradients, the adapter's additions), the width of queries
and keys (rotation) and the intermediate size (SwiGLU)."""

OPTIMIZER_PASSES = 12
"""Times that a trained number is read or written for clipping and AdamW, its moments included."""


class LayerLike(Protocol):
    """What a layer and the head took: see model/speed.py's LayerSeconds."""

    @property
    def tokens(self) -> int: ...

    @property
    def squares(self) -> int: ...

    @property
    def kept(self) -> float: ...

    @property
    def recomputed(self) -> float: ...

    @property
    def label(self) -> float: ...


@dataclass(frozen=True)
class Speed:
    """What a device does in a second, and where that is from.

    product_flops: of the base's products, decoding included. plain_flops: of plain products in the
    compute dtype. bytes: read and written by elementwise work. layer_seconds: that the calls of one
    layer's step take by themselves. measured: whether on this device. layer: a layer that was run
    there, where one was.
    """

    product_flops: float
    plain_flops: float
    bytes: float
    layer_seconds: float
    source: str
    measured: bool
    layer: LayerLike | None = None


@dataclass(frozen=True)
class StepWork:
    """What a mean step has to do. squares: the sum of L^2 over its documents. packs: that its
    tokens come in."""

    tokens: float
    labels: float
    squares: float
    packs: float = 1.0


def step_seconds(
    work: Workload, schedule: Schedule, step: StepWork, speed: Speed
) -> dict[str, float]:
    """Seconds of a mean step, by part."""
    if speed.layer is not None:
        return _by_layers(work, schedule, step, speed, speed.layer)
    config, size = work.config, sizes(work.config)
    tokens, labels = int(step.tokens), int(step.labels)
    base = training_flops(
        config, tokens, labels, frozen_base=not work.trains_all, whole=work.whole or Whole()
    )
    again = schedule.recomputed_share / (3 if work.trains_all else 2)
    if work.whole is not None:
        again = schedule.recomputed_share * layer_flops(config, tokens, labels) / base
    layers = config.num_hidden_layers
    backward = layers - work.lowest
    attention = step.squares * _attention_flops(work)
    narrow = 0.0
    if work.rank is not None:
        # Forward x A and its B; backward x A again, g B, and the gradients of A, B and x. PiSSA has
        # twice the rank in all of them but the gradients of A and B.
        of_a, of_b = (7, 5) if work.keeps_start else (4, 3)
        narrow = sum(
            2 * step.tokens * work.rank * (of_a * size[source] + of_b * size[target]) * layers
            for name, (source, target) in LINEARS.items()
            if name in work.targets
        )
    passes = (
        HIDDEN_PASSES * size["hidden"]
        + HEAD_PASSES * (size["queries"] + size["keys"])
        + INNER_PASSES * size["inner"]
    )
    # A third of it is the forward pass.
    passed = (layers + 2 * backward) / 3
    elementwise = step.tokens * passes * passed * work.compute_bytes
    optimizer = OPTIMIZER_PASSES * 4 * held_parameter_count(work)
    return {
        "products": base * (1 + again) / speed.product_flops,
        "attention": attention / (ATTENTION_SHARE * speed.plain_flops),
        "adapter": narrow / (NARROW_SHARE * speed.plain_flops),
        "elementwise": elementwise / speed.bytes,
        "optimizer": optimizer / speed.bytes,
        "calls": passed * speed.layer_seconds * step.packs,
    }


def _attention_flops(work: Workload) -> float:
    """For each L^2 of a document: scores and values forward, five such products backward; half of
    each is above the diagonal."""
    layers = work.config.num_hidden_layers
    return sizes(work.config)["queries"] * (2 * layers + 5 * (layers - work.lowest))


def _by_layers(
    work: Workload, schedule: Schedule, step: StepWork, speed: Speed, layer: LayerLike
) -> dict[str, float]:
    """Seconds of a mean step of so many layers as the one that was run.

    The last layer computes less where few tokens have labels, and the first passes no gradient on:
    both count by their share of the base's products.
    """
    config, tokens, labels = work.config, int(step.tokens), int(step.labels)
    frozen = not work.trains_all
    products = training_flops(config, tokens, labels, frozen_base=frozen, outputs=0)
    one = middle_layer_flops(config, tokens, frozen_base=frozen)
    packs = tokens / layer.tokens
    most = most_recomputed_share(work)
    again = schedule.recomputed_share / most if most else 0.0
    longer = max(0.0, step.squares - layer.squares * packs)
    return {
        "layers": products / one * packs * layer.kept,
        "recomputation": products / one * packs * again * (layer.recomputed - layer.kept),
        "longer documents": longer * _attention_flops(work) / (ATTENTION_SHARE * speed.plain_flops),
        "head": labels * layer.label,
        "optimizer": OPTIMIZER_PASSES * 4 * held_parameter_count(work) / speed.bytes,
    }
