"""Seconds of a step from its arithmetic and its traffic, and from what a device does in a second.

Six kinds of work, each with a rate of its own: the base's products (with decoding, as the codec
needs it), attention, the adapter's narrow products, elementwise work, the optimizer, and calling
all of it. Rates of products and of elementwise work are measured; attention and narrow products are
taken at a share of the plain product's.

T: tokens of a step   L: tokens of one document   r: LoRA's rank   c: bytes of a computed number
"""

from __future__ import annotations

from dataclasses import dataclass

from llamaweft.plan.flops import training_flops
from llamaweft.plan.memory import LINEARS, Schedule, Workload, sizes, trained_parameter_count

ATTENTION_SHARE, NARROW_SHARE = 0.4, 0.5
"""Of the plain product's rate: what attention's products and the adapter's reach (docs/plan.md)."""

HIDDEN_PASSES, HEAD_PASSES, INNER_PASSES = 60, 16, 30
"""Numbers read or written by elementwise work in one layer's step, for each token: so many times
the hidden size (norms, residuals, their gradients, the adapter's additions), the width of queries
and keys (rotation) and the intermediate size (SwiGLU)."""

OPTIMIZER_PASSES = 12
"""Times that a trained number is read or written for clipping and AdamW, its moments included."""


@dataclass(frozen=True)
class Speed:
    """What a device does in a second, and where that is from.

    product_flops: of the base's products, decoding included. plain_flops: of plain products in the
    compute dtype. bytes: read and written by elementwise work. layer_seconds: that the calls of one
    layer's step take by themselves. measured: whether on this device.
    """

    product_flops: float
    plain_flops: float
    bytes: float
    layer_seconds: float
    source: str
    measured: bool


@dataclass(frozen=True)
class StepWork:
    """What a mean step has to do. squares: the sum of L^2 over its documents."""

    tokens: float
    labels: float
    squares: float


def step_seconds(
    work: Workload, schedule: Schedule, step: StepWork, speed: Speed
) -> dict[str, float]:
    """Seconds of a mean step, by part."""
    config, size = work.config, sizes(work.config)
    frozen = work.rank is not None
    base = training_flops(config, int(step.tokens), int(step.labels), frozen_base=frozen)
    again = schedule.recomputed_share / (2 if frozen else 3)
    layers = config.num_hidden_layers
    # Scores and values forward, five such products backward; half of each is above the diagonal.
    attention = 7 * step.squares * size["queries"] * layers
    narrow = 0.0
    if work.rank is not None:
        # Forward x A and its B; backward x A again, g B, and the gradients of A, B and x.
        narrow = sum(
            2 * step.tokens * work.rank * (4 * size[source] + 3 * size[target]) * layers
            for name, (source, target) in LINEARS.items()
            if name in work.targets
        )
    passes = (
        HIDDEN_PASSES * size["hidden"]
        + HEAD_PASSES * (size["queries"] + size["keys"])
        + INNER_PASSES * size["inner"]
    )
    elementwise = step.tokens * passes * layers * work.compute_bytes
    optimizer = OPTIMIZER_PASSES * 4 * trained_parameter_count(work)
    return {
        "products": base * (1 + again) / speed.product_flops,
        "attention": attention / (ATTENTION_SHARE * speed.plain_flops),
        "adapter": narrow / (NARROW_SHARE * speed.plain_flops),
        "elementwise": elementwise / speed.bytes,
        "optimizer": optimizer / speed.bytes,
        "calls": layers * speed.layer_seconds,
    }
