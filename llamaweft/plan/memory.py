"""Peak memory of a training run from its shapes, and what to keep so that it fits.

Pure arithmetic: shapes and a budget in, a Schedule out. What is counted is anonymous memory on a
CPU, where frozen weights are mapped files, and device memory on a GPU.

T: tokens of a pack   R: rows of the last layer that a label needs   M: rows of an MLP tile
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from typing import Any

from llamaweft.errors import UserError
from llamaweft.model.presets import LlamaConfig, parameter_count
from llamaweft.plan.shapes import LINEARS, MLP, OF_ALL_TOKENS, linear_weights, sizes
from llamaweft.plan.whole import Whole

MLP_TILE_TOKENS = 1024
"""Rows of an MLP that are computed at once. More rows make no product faster, and a long pack
would need memory for all of them."""

LOGIT_BYTES = 160 * 2**20
LEAST_LABELS, MOST_LABELS = 384, 1024
"""Labels whose logits are held at once: few, and no more than have so many bytes, where memory is
short; many where everything is kept. Products gain from more up to there."""

ATTENTION_BLOCK = 64, 2048
ATTENTION_BUFFERS = 6
"""Queries and keys of the blocks that attention's backward pass works on, and how many buffers of
their scores are alive at once, those that the C library still holds included."""

TILE_NUMBERS, TILE_BYTES = 512, 4 * 2**20
"""Rows or columns of a frozen matrix that are decoded at once, or as many as have so many bytes."""

NORM_BYTES = 12
"""What a frozen matrix keeps for each output where that has a magnitude: its row's squared norm in
fp64, and the norm with the adapter in fp32."""

FRAGMENT_SHARE = 8
SHORT_FRAGMENT_BYTES = 96 * 2**20
"""Fragments that the C library holds on to are this part of what is taken and freed, or less; where
memory is short, at least so many bytes, of tensors too small to be given back."""

KEPT_SHARE = 16
"""The same where large tensors are taken from what it keeps, instead of being mapped anew."""

KEEPABLE = {
    "down_proj": ("down_proj", "hidden"),
    "o_proj": ("o_proj", "hidden"),
    "mid": ("o_proj", "hidden"),
    "q_proj": ("q_proj", "queries"),
    "k_proj": ("k_proj", "keys"),
    "v_proj": ("v_proj", "keys"),
    "gate_proj": ("gate_proj", "inner"),
    "up_proj": ("up_proj", "inner"),
    "attention": (None, "queries"),
}
"""What a layer may keep: the product that is then not computed again, and the width that is held
(model/replay.py). In the order in which a budget is spent: attention's own arithmetic is small."""

KEPT_FOR_MAGNITUDES = ("down_proj", "o_proj")
"""Outputs that only the gradient of a magnitude needs."""


@dataclass(frozen=True)
class Workload:
    """What decides the memory of a run.

    pack_tokens: tokens of the largest pack. labels: trained tokens in it, at most.
    rank: LoRA's r, or None without an adapter. targets: adapted linear layers. magnitudes:
    whether each has a trained magnitude, and needs its output in the backward pass (DoRA).
    whole: what is trained whole beside what is frozen; None: beside an adapter nothing, else all.
    weight_bytes: of the frozen weights, where they take memory of the kind that is counted.
    compute_bytes, kept_bytes: of a number as it is computed with, and as it is kept.
    optimizer_bytes: of the optimizer's state, for each trained number.
    runtime_bytes: what the process holds before a model is loaded. fragment_bytes: what the C
    library holds on to, at most.
    keeps_attention: whether attention's output can be kept; on a GPU it is computed again.
    accumulates: whether gradients of one pack are held while another is computed.
    keeps_start: whether what A and B started from is held beside them (PiSSA). start_bytes: what
    finding it takes for a moment, before anything of a step is held.
    head_outputs: of a head that is the task's own, and trained; None: the vocabulary.
    forgetting_bytes: of what is kept of the model as the run began, to compare with.
    new_token_numbers: in the rows of new tokens, trained beside an adapter.
    in_backward: whether each gradient is used and freed as soon as it is there.
    large_tensors: whether the C library maps tensors one by one, so that it may give them back as
    soon as they are freed, or keep them.
    elsewhere_numbers: trained numbers that other ranks hold, or the host, with their gradients and
    moments. gathered_bytes: modules of several ranks that are whole for a moment (plan/rank.py).
    """

    config: LlamaConfig
    pack_tokens: int
    labels: int
    rank: int | None
    targets: tuple[str, ...]
    compute_bytes: int
    runtime_bytes: int
    weight_bytes: int = 0
    kept_bytes: int | None = None
    optimizer_bytes: float = 8.0
    fragment_bytes: int = 0
    keeps_attention: bool = True
    accumulates: bool = True
    magnitudes: bool = False
    keeps_start: bool = False
    start_bytes: int = 0
    head_outputs: int | None = None
    forgetting_bytes: int = 0
    new_token_numbers: int = 0
    whole: Whole | None = None
    in_backward: bool = False
    large_tensors: bool = False
    elsewhere_numbers: int = 0
    gathered_bytes: int = 0

    @property
    def trains_all(self) -> bool:
        """Whether every weight of the model is trained."""
        return self.rank is None and self.whole is None

    @property
    def lowest(self) -> int:
        """The lowest layer that the backward pass comes to: those below keep nothing for it."""
        return 0 if self.whole is None else self.whole.lowest

    @property
    def outputs(self) -> int:
        """What the head says at a label: the vocabulary, or what the task has."""
        return self.config.vocab_size if self.head_outputs is None else self.head_outputs

    @property
    def keepable(self) -> tuple[str, ...]:
        """What a layer may keep, in the order in which a budget is spent. Where the output of
        o_proj is kept, that of the segment behind it spares nothing more."""
        unused = {n for n in KEPT_FOR_MAGNITUDES if not self.needs_output(n)}
        if "o_proj" not in unused:
            unused.add("mid")
        if not self.keeps_attention:
            unused.add("attention")
        return tuple(n for n in KEEPABLE if n not in unused)

    def needs_output(self, linear: str) -> bool:
        """Whether the backward pass needs the output of this linear layer for its magnitude."""
        return self.magnitudes and linear in self.targets


@dataclass(frozen=True)
class Schedule:
    """What is kept for the backward pass, with the bytes by part.

    keep: for each layer, names of KEEPABLE. mlp_tile_tokens, loss_tile_labels: rows of an MLP, and
    labels, that are computed at once. recomputed_share: multiplications of the base that are
    done again, as a share of those of one forward pass. keeps_freed: whether the C library keeps
    large tensors that are freed, which spares faulting them in again and leaves fragments.
    returns_freed: whether it gives back those of models with small ones too, since memory is short.
    """

    keep: tuple[tuple[str, ...], ...]
    mlp_tile_tokens: int
    loss_tile_labels: int
    recomputed_share: float
    parts: dict[str, int]
    keeps_freed: bool = False
    returns_freed: bool = False

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Schedule | None:
        """What `to_dict` gave, read back from JSON; None if an older version wrote less."""
        names = ("mlp_tile_tokens", "loss_tile_labels", "recomputed_share", "parts")
        if any(name not in content for name in names):
            return None
        keep = tuple(tuple(names) for names in content["keep"])
        made = cls(keep, *(content[name] for name in names))
        freed = {name: content.get(name, False) for name in ("keeps_freed", "returns_freed")}
        return replace(made, **freed)


def solve(work: Workload, budget_bytes: int | None) -> Schedule:
    """The schedule with the least recomputation that stays inside the budget.

    All that may be kept saves the same arithmetic for its bytes, since its products have inputs of
    the same width; so whatever fits is taken, the last layers first. Raises UserError, with the
    smallest budget that works, when none does.
    """
    layers = work.config.num_hidden_layers
    all_kept = [work.keepable if layer >= work.lowest else () for layer in range(layers)]
    nothing_again = [schedule(work, all_kept, MOST_LABELS), schedule(work, all_kept)]
    if work.large_tensors:
        nothing_again.insert(0, schedule(work, all_kept, MOST_LABELS, keeps_freed=True))
    for made in nothing_again:
        if budget_bytes is None or made.peak_bytes <= budget_bytes:
            return made
    assert budget_bytes is not None
    keep: list[tuple[str, ...]] = [()] * layers
    for name in work.keepable:
        keep = _kept_where_it_fits(work, keep, name, budget_bytes)
    made = schedule(work, keep)
    if made.peak_bytes <= budget_bytes:
        return made
    smallest = min(each.peak_bytes for each in (made, *nothing_again))
    raise UserError(
        f"training.memory_budget: {_gib(budget_bytes)} is too small for this model and pack; "
        f"the smallest that works is {_gib(smallest, up=True)}, or lower "
        "training.micro_batch_tokens"
    )


def _kept_where_it_fits(
    work: Workload, keep: list[tuple[str, ...]], name: str, budget_bytes: int
) -> list[tuple[str, ...]]:
    """`name` kept too, by as many of the last layers as the budget has room for. By all of few
    layers it may take less than by none, since a layer's workspace is then smaller; so it is taken
    even where neither fits."""
    layers = len(keep) - work.lowest

    def kept_by(count: int) -> list[tuple[str, ...]]:
        first = len(keep) - count
        return [*keep[:first], *((*names, name) for names in keep[first:])]

    def peak(count: int) -> int:
        return schedule(work, kept_by(count)).peak_bytes

    if peak(layers) <= max(budget_bytes, peak(0)):
        return kept_by(layers)
    return kept_by(bisect_right(range(1, layers), budget_bytes, key=peak))


def schedule(
    work: Workload,
    keep: list[tuple[str, ...]],
    loss_tile_labels: int | None = None,
    *,
    keeps_freed: bool = False,
) -> Schedule:
    """The bytes by part when each layer keeps what `keep` says; loss_tile_labels: None for few,
    where memory is short."""
    is_short = loss_tile_labels is None
    if loss_tile_labels is None:
        most = LOGIT_BYTES // (4 * work.outputs)
        loss_tile_labels = max(1, min(LEAST_LABELS, most))
    trained = held_parameter_count(work)
    layers = work.config.num_hidden_layers
    backward = range(work.lowest, layers)
    inputs = len(backward) * work.pack_tokens * work.config.hidden_size * work.compute_bytes
    kept = sum(kept_bytes(work, name, i) for i, names in enumerate(keep) for name in names)
    workspace = workspace_bytes(work, keep, loss_tile_labels)
    freed = inputs + kept + workspace
    at_least = min(SHORT_FRAGMENT_BYTES, freed // 2) if is_short else 0
    fragments = min(work.fragment_bytes, max(at_least, freed // FRAGMENT_SHARE))
    if keeps_freed:
        fragments = freed // KEPT_SHARE
    held = NORM_BYTES * magnitude_count(work) + 4 * kept_start_numbers(work)
    parts = {
        "runtime": work.runtime_bytes + fragments,
        "weights": work.weight_bytes + held,
        "trained": 4 * trained,
        "gradients": _gradient_bytes(work, inputs + kept),
        "optimizer": round(work.optimizer_bytes * trained),
        "activations": inputs + kept,
        "workspace": workspace,
    }
    of_a_step = sum(parts[name] for name in ("gradients", "optimizer", "activations"))
    parts["workspace"] = max(workspace, work.start_bytes - of_a_step)
    if work.gathered_bytes:
        parts["gathered"] = work.gathered_bytes
    if work.forgetting_bytes:
        parts["forgetting"] = work.forgetting_bytes
    again = sum(recomputed_multiplications(work, keep[i], i) for i in backward)
    once = sum(layer_multiplications(work, i) for i in range(layers))
    return Schedule(
        tuple(keep), MLP_TILE_TOKENS, loss_tile_labels, again / once, parts, keeps_freed, is_short
    )


def _gradient_bytes(work: Workload, activations: int) -> int:
    """Gradients at the peak. With one pack a step they grow as activations are given up, layer by
    layer; so they count only as far as they become the larger."""
    if work.in_backward:
        return 4 * _largest_at_once(work)
    gradients = 4 * held_parameter_count(work)
    return gradients if work.accumulates else max(0, gradients - activations)


def trained_parameter_count(work: Workload) -> int:
    """Numbers that are trained: the adapter's and what is trained whole, or all of the model's."""
    trained = parameter_count(work.config) if work.trains_all else 0
    if work.rank is not None:
        trained += adapter_parameters(work)
    if work.whole is not None:
        trained += work.whole.parameters
    trained += work.new_token_numbers
    if work.head_outputs is None:
        return trained
    if work.trains_all and not work.config.tie_word_embeddings:
        trained -= work.config.vocab_size * work.config.hidden_size  # the head that it had
    return trained + work.head_outputs * work.config.hidden_size


def held_parameter_count(work: Workload) -> int:
    """Those of them that this process holds, and steps."""
    return trained_parameter_count(work) - work.elsewhere_numbers


def _largest_at_once(work: Workload) -> int:
    """Numbers of the largest gradients that are held together: of one parameter, but of all in an
    MLP where it is computed in tiles, each of which adds to them."""
    weights, size = linear_weights(work.config), sizes(work.config)
    adapted = [n for n in work.targets if n in LINEARS]
    pairs = {n: (work.rank or 0) * (size[LINEARS[n][0]] + size[LINEARS[n][1]]) for n in adapted}
    whole = {n for _, n in work.whole.linears} if work.whole else set()
    linears = {n: (n in whole or work.trains_all) * weights[n] + pairs.get(n, 0) for n in LINEARS}
    rest = [work.config.hidden_size * (work.head_outputs or 0)]
    if work.trains_all:
        rest.append(work.config.vocab_size * work.config.hidden_size)
    if work.whole is not None:
        rest.append(work.whole.largest)
    tiled = sum(linears[n] for n in MLP) if work.pack_tokens > MLP_TILE_TOKENS else 0
    return max(tiled, work.new_token_numbers, *rest, *linears.values())


def adapter_parameters(work: Workload) -> int:
    """Numbers in lora_A, lora_B and the magnitudes of every adapted layer."""
    return _pair_numbers(work) + magnitude_count(work)


def kept_start_numbers(work: Workload) -> int:
    """Numbers of what A and B started from, where that is held: as many as A and B have."""
    return _pair_numbers(work) if work.keeps_start else 0


def _pair_numbers(work: Workload) -> int:
    """Numbers in lora_A and lora_B of every adapted layer."""
    assert work.rank is not None
    size = sizes(work.config)
    per_layer = sum(
        size[source] + size[target]
        for name, (source, target) in LINEARS.items()
        if name in work.targets
    )
    return work.config.num_hidden_layers * work.rank * per_layer


def magnitude_count(work: Workload) -> int:
    """Magnitudes of all adapted layers: one for each output."""
    size = sizes(work.config)
    outputs = sum(size[out] for name, (_, out) in LINEARS.items() if work.needs_output(name))
    return work.config.num_hidden_layers * outputs


def kept_bytes(work: Workload, name: str, layer: int) -> int:
    """Bytes of one kept output."""
    width = sizes(work.config)[KEEPABLE[name][1]]
    normaliser = 4 * work.config.num_attention_heads if name == "attention" else 0
    held = work.compute_bytes
    if work.kept_bytes is not None and name not in ("mid", "attention"):
        held = work.kept_bytes
    return _rows(work, name, layer) * (width * held + normaliser)


def _rows(work: Workload, name: str, layer: int) -> int:
    last = layer == work.config.num_hidden_layers - 1
    trimmed = last and name not in OF_ALL_TOKENS
    return min(work.labels, work.pack_tokens) if trimmed else work.pack_tokens


def layer_multiplications(work: Workload, layer: int) -> int:
    """Multiplications of the base's products in one forward pass of a layer."""
    size = sizes(work.config)
    return sum(_rows(work, n, layer) * size[a] * size[b] for n, (a, b) in LINEARS.items())


def recomputed_multiplications(work: Workload, kept: tuple[str, ...], layer: int) -> int:
    """Those that the backward pass does again. The last product of each segment never is, unless
    the hidden state between the segments was not kept, or the product has a magnitude."""
    size = sizes(work.config)
    spared = {KEEPABLE[name][0] for name in kept}
    if not work.needs_output("down_proj"):
        spared.add("down_proj")
    return sum(
        _rows(work, n, layer) * size[a] * size[b]
        for n, (a, b) in LINEARS.items()
        if n not in spared
    )


def most_recomputed_share(work: Workload) -> float:
    """The recomputed_share of a schedule that keeps nothing."""
    layers = range(work.config.num_hidden_layers)
    again = sum(recomputed_multiplications(work, (), i) for i in layers[work.lowest :])
    return again / sum(layer_multiplications(work, i) for i in layers)


def workspace_bytes(work: Workload, keep: list[tuple[str, ...]], loss_tile_labels: int) -> int:
    """What is alive for a moment: the largest of a layer's backward pass and the head, a decoded
    tile of a weight, and what trained weights need."""
    size, tokens = sizes(work.config), work.pack_tokens
    tile = min(tokens, MLP_TILE_TOKENS)
    hidden, inner, queries, keys = (size[n] for n in ("hidden", "inner", "queries", "keys"))
    # Gate and up, unless they were kept; their product or one's gradient; the other's gradient.
    keep = keep[work.lowest :] or [("mid",)]  # no layer has a backward pass: its forward pass
    fresh = max(2 - ("gate_proj" in names) - ("up_proj" in names) for names in keep)
    mlp = tile * inner * (2 + fresh) + 6 * tokens * hidden
    if any("mid" not in names for names in keep):
        mlp += tokens * (2 * queries + 2 * keys + 2 * hidden)
    attention = tokens * (6 * hidden + 4 * queries + 4 * keys)
    if work.magnitudes:  # outputs that stay until their gradient, and one scaled gradient
        mlp += tile * (inner + hidden)
        attention += tokens * (queries + 2 * keys + hidden + max(queries, hidden))
    queries_at_once, keys_at_once = ATTENTION_BLOCK
    scores = work.config.num_attention_heads * queries_at_once * min(tokens, keys_at_once) * 4
    blocks = ATTENTION_BUFFERS * scores
    layer = max(mlp * work.compute_bytes, attention * work.compute_bytes + blocks)
    logits = 4 * work.outputs * min(work.labels, loss_tile_labels)
    head = logits + 3 * work.labels * hidden * work.compute_bytes
    decoded = max(TILE_NUMBERS * max(inner, 2 * hidden) * 4, 2 * TILE_BYTES)
    trained_head = trained_embedding = 0
    whole = work.whole or Whole(0, embedding=work.trains_all, head=work.trains_all)
    if whole.head:
        cast = work.compute_bytes if work.compute_bytes != 4 else 0
        trained_head = work.outputs * hidden * (4 + cast)
    if whole.embedding:
        trained_embedding = 4 * work.config.vocab_size * hidden  # before it is added to others
    of_trained = 3 * inner * hidden * work.compute_bytes
    if work.trains_all:
        decoded = of_trained
    elif whole.linears:
        decoded = max(decoded, of_trained)
    return max(layer, head + trained_head, trained_embedding) + decoded


def _gib(count: int, up: bool = False) -> str:
    """`up` rounds to the next hundredth, so that what is printed is enough."""
    hundredths = -(-count * 100 // 2**30) if up else count * 100 // 2**30
    return f"{hundredths / 100:.2f}GiB"
