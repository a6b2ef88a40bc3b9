"""Peak memory of a training run from its shapes, and what to recompute so that it fits.

Pure arithmetic: shapes and a budget in, a Schedule out. T: tokens of a pack.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llamaweft.errors import UserError
from llamaweft.model.presets import LlamaConfig, parameter_count

RUNTIME_BYTES = 420 * 2**20
"""Anonymous memory of the process before a model is loaded: Python, torch, the tokenizer."""

LOGIT_TILE_BYTES = 3 * 32 * 2**20
"""The tile of logits that the loss works on, with its temporaries."""

LINEARS = {
    "q_proj": ("hidden", "queries"),
    "k_proj": ("hidden", "keys"),
    "v_proj": ("hidden", "keys"),
    "o_proj": ("queries", "hidden"),
    "gate_proj": ("hidden", "inner"),
    "up_proj": ("hidden", "inner"),
    "down_proj": ("inner", "hidden"),
}
"""Input and output of each linear layer."""


@dataclass(frozen=True)
class Workload:
    """What decides the memory of a run.

    pack_tokens: tokens of the largest pack. labels: trained tokens in it, at most.
    rank: LoRA's r, or None for full fine-tuning. targets: adapted linear layers.
    frozen_bytes, compute_bytes: bytes of an element as it is held and as it is computed with.
    """

    config: LlamaConfig
    pack_tokens: int
    labels: int
    rank: int | None
    targets: tuple[str, ...]
    frozen_bytes: int
    compute_bytes: int


@dataclass(frozen=True)
class Schedule:
    """What is kept for the backward pass and what is computed again, with the bytes by part.

    recompute_layers: the first so many layers keep only their input.
    """

    recompute_layers: int
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes}


def solve(work: Workload, budget_bytes: int | None) -> Schedule:
    """The schedule with the least recomputation that stays inside the budget.

    Raises UserError, with the smallest budget that works, when none does.
    """
    layers = work.config.num_hidden_layers
    least = schedule(work, layers)
    if budget_bytes is not None and least.peak_bytes > budget_bytes:
        raise UserError(
            f"training.memory_budget: {_gib(budget_bytes)} is too small for this model and pack; "
            f"the smallest that works is {_gib(least.peak_bytes, up=True)}, or lower "
            "training.micro_batch_tokens"
        )
    for recomputed in range(layers):
        found = schedule(work, recomputed)
        if budget_bytes is None or found.peak_bytes <= budget_bytes:
            return found
    return least


def schedule(work: Workload, recompute_layers: int) -> Schedule:
    """The bytes by part when the first `recompute_layers` layers are recomputed."""
    config = work.config
    trained = trained_parameter_count(work)
    weights = 0 if work.rank is None else parameter_count(config) * work.frozen_bytes
    kept = layer_activation_bytes(work)
    layer_input = work.pack_tokens * config.hidden_size * work.compute_bytes
    full_layers = config.num_hidden_layers - recompute_layers
    activations = full_layers * kept + recompute_layers * layer_input
    parts = {
        "runtime": RUNTIME_BYTES,
        "weights": weights,
        "trained": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": activations,
        "workspace": _workspace_bytes(work) + (kept if recompute_layers else 0),
    }
    return Schedule(recompute_layers, parts)


def trained_parameter_count(work: Workload) -> int:
    """Numbers that are trained: the adapter's, or all of the model's."""
    return parameter_count(work.config) if work.rank is None else adapter_parameters(work)


def adapter_parameters(work: Workload) -> int:
    """Numbers in lora_A and lora_B of every adapted layer."""
    assert work.rank is not None
    sizes = _sizes(work.config)
    per_layer = sum(
        sizes[source] + sizes[target]
        for name, (source, target) in LINEARS.items()
        if name in work.targets
    )
    return work.config.num_hidden_layers * work.rank * per_layer


def layer_activation_bytes(work: Workload) -> int:
    """What one layer keeps for its backward pass.

    In the compute dtype: both norms' outputs where a trained product needs them as input, q, k
    and v after rotation, the attention's output, gate, up and silu(gate) and, where the down
    projection is trained or adapted, its input. In fp32: the inputs of both norms, which are
    the residual stream, cast.
    """
    sizes = _sizes(work.config)
    trained = set(LINEARS) if work.rank is None else set(work.targets)
    elements = sizes["queries"] * 2 + sizes["keys"] * 2 + sizes["inner"] * 3
    if trained & {"q_proj", "k_proj", "v_proj"}:
        elements += sizes["hidden"]
    if trained & {"gate_proj", "up_proj"}:
        elements += sizes["hidden"]
    if "down_proj" in trained:
        elements += sizes["inner"]
    weights = _weight_copy_elements(work)
    return (
        work.pack_tokens * (elements * work.compute_bytes + 2 * sizes["hidden"] * 4)
        + weights * work.compute_bytes
    )


def _weight_copy_elements(work: Workload) -> int:
    """Trained weights are cast once a pass where the compute dtype is not fp32."""
    if work.compute_bytes == 4:
        return 0
    if work.rank is not None:
        return adapter_parameters(work) // work.config.num_hidden_layers
    sizes = _sizes(work.config)
    return sum(sizes[source] * sizes[target] for source, target in LINEARS.values())


def _workspace_bytes(work: Workload) -> int:
    """What is alive for a moment: the widest layer's gradients, a tile of logits, and copies of
    a weight where it is held in another dtype than it is computed in."""
    sizes = _sizes(work.config)
    head = work.config.vocab_size * sizes["hidden"]
    copies = head * work.compute_bytes if work.compute_bytes != work.frozen_bytes else 0
    wide = 5 * work.pack_tokens * sizes["inner"] * work.compute_bytes
    labels = 2 * work.labels * sizes["hidden"] * work.compute_bytes
    head_gradient = head * 4 if work.rank is None else 0
    return wide + labels + copies + head_gradient + LOGIT_TILE_BYTES


def _sizes(config: LlamaConfig) -> dict[str, int]:
    return {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
    }


def _gib(count: int, up: bool = False) -> str:
    """`up` rounds to the next tenth, so that what is printed is enough."""
    tenths = -(-count * 10 // 2**30) if up else round(count * 10 / 2**30)
    return f"{tenths / 10:.1f}GiB"
