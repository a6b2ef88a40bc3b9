"""What the ranks of a run send each other in an optimizer step, and how long that takes.

Payload is the size of what a collective works on: the tensor of an all-reduce, the whole result of
an all-gather, the whole input of a reduce-scatter. On the wire each rank of a ring of n sends
2 (n-1)/n of it for an all-reduce and (n-1)/n for the others (Patarasuk & Yuan, 2009: Bandwidth
optimal all-reduce algorithms). docs/scaling.md has the formulae. A few numbers a step for losses,
norms and clocks are left out.

T: tokens of a rank   N: labels of a rank   E: hidden size   c: bytes of a computed number
"""

from __future__ import annotations

from dataclasses import dataclass

from llamaweft.parallel.layout import Layout
from llamaweft.plan.devices import CALL_SECONDS, LINK_REACHED, Machines
from llamaweft.plan.memory import Schedule, Workload, trained_parameter_count
from llamaweft.plan.rank import TRAINED_BYTES, units
from llamaweft.plan.shapes import LINEARS
from llamaweft.plan.time import StepWork
from llamaweft.plan.whole import Whole

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
HOST_COPY = "copy"
"""Between a device and its host's memory: no collective."""

WIRE = {ALL_REDUCE: 2, ALL_GATHER: 1, REDUCE_SCATTER: 1}
"""How often each byte crosses the wire of a large ring."""

HEAD_SUMS = 3
"""Numbers in fp32 that ranks join for each label: its largest logit, the sum of exponentials, the
target's logit."""


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind over one group of ranks, in one optimizer step, of one rank.

    group: `tensor`, `shard`, `data`, `data x shard`, `all`, or `host`. stride: how far apart its
    ranks are numbered. payload_bytes, calls: of all of them together.
    """

    what: str
    kind: str
    group: str
    ranks: int
    stride: int
    payload_bytes: float
    calls: float

    @property
    def wire_bytes(self) -> float:
        """What the rank sends in rings."""
        if self.kind == HOST_COPY:
            return self.payload_bytes
        return WIRE[self.kind] * (self.ranks - 1) / self.ranks * self.payload_bytes

    def seconds(self, machines: Machines) -> float:
        """By data sheets, one collective after the other, nothing computed meanwhile."""
        if self.kind == HOST_COPY:
            rate = machines.device.host
        else:
            rate = machines.bandwidth(self.stride, self.ranks)
        return self.wire_bytes / (LINK_REACHED * rate) + self.calls * CALL_SECONDS


def communication(
    work: Workload, layout: Layout, schedule: Schedule, codec: str, step: StepWork
) -> list[Transfer]:
    """What one rank sends in an optimizer step. work, schedule, step: of the rank
    (plan/rank.py). codec: that frozen weights are held in. Empty for one process alone."""
    found = [
        *_summed_gradients(work, layout, codec),
        *_sharded(work, layout, codec, step.packs),
        *_cut(work, layout, schedule, step),
    ]
    return [transfer for transfer in found if transfer.payload_bytes]


def _transfer(
    layout: Layout, what: str, kind: str, group: str, payload: float, calls: float
) -> Transfer:
    sizes_of = {
        "tensor": (layout.tensor, 1),
        "shard": (layout.shard, layout.tensor),
        "data": (layout.data, layout.tensor * layout.shard),
        "data x shard": (layout.pack_ranks, layout.tensor),
        "all": (layout.world, 1),
        "host": (2, 1),
    }
    ranks, stride = sizes_of[group]
    return Transfer(what, kind, group, ranks, stride, payload if ranks > 1 else 0, calls)


def _summed_gradients(work: Workload, layout: Layout, codec: str) -> list[Transfer]:
    """Once a step, in fp32: gradients of what all pack ranks hold; of halves of an adapter that all
    tensor ranks hold too, which have parts of a sum; and of what is sharded, over its replicas."""
    sharded = 0
    if layout.shard > 1:
        sharded = sum(unit.trained for unit in units(work, codec))
    partial = partial_numbers(work) if layout.tensor > 1 else 0
    held = trained_parameter_count(work) - sharded - partial
    return [
        _transfer(layout, what, ALL_REDUCE, group, TRAINED_BYTES * numbers, 1)
        for what, group, numbers in (
            ("gradients", "data x shard", held),
            ("gradients of uncut halves", "all", partial),
            ("gradients of shards", "data", sharded / layout.shard),
        )
    ]


def partial_numbers(work: Workload) -> int:
    """Numbers in lora_A of what is cut by outputs and lora_B of what is cut by inputs: `tensor`
    leaves them whole."""
    if work.rank is None:
        return 0
    adapted = sum(name in work.targets for name in LINEARS)
    return work.config.num_hidden_layers * work.rank * work.config.hidden_size * adapted


def _sharded(work: Workload, layout: Layout, codec: str, packs: float) -> list[Transfer]:
    """For each pack a module is gathered for the forward pass, and where gradients go through it
    once more: but for the last layer and the head, which the backward pass begins with and finds in
    memory. Gradients are summed and scattered pack by pack."""
    if layout.shard == 1:
        return []
    last = work.config.num_hidden_layers - 1
    gathered = calls = gradients = sums = 0
    for unit in units(work, codec):
        again = unit.trained > 0 if unit.layer is None else work.lowest <= unit.layer < last
        times = 1 + (again and unit.name != "lm_head")
        gathered += times * unit.held_bytes
        calls += times
        gradients += unit.gradient_bytes
        sums += unit.trained > 0
    found = [
        _transfer(layout, "weights", ALL_GATHER, "shard", packs * gathered, packs * calls),
        _transfer(layout, "gradients", REDUCE_SCATTER, "shard", packs * gradients, packs * sums),
    ]
    if layout.offload:
        moved = packs * (gathered + gradients) / layout.shard
        found.append(
            _transfer(layout, "parts of weights", HOST_COPY, "host", moved, packs * (calls + sums))
        )
    return found


def _cut(work: Workload, layout: Layout, schedule: Schedule, step: StepWork) -> list[Transfer]:
    """Sums over `tensor`: of each layer's two outputs and, where the backward pass needs them, of
    the gradients of its two inputs; the embedding's output; of each label in the vocabulary's head
    three numbers, and in fp32 the gradient of its hidden state."""
    if layout.tensor == 1:
        return []
    rows = outputs_of(work, schedule, step.tokens, step.labels)
    gradients = inputs_of(work, schedule, step.tokens, step.labels)
    width = work.config.hidden_size * work.compute_bytes
    layers, tokens = work.config.num_hidden_layers, step.tokens
    tiles = -(-tokens / step.packs // schedule.mlp_tile_tokens)
    calls = step.packs * layers * (1 + tiles)
    found = [
        ("outputs of layers", width * rows, calls),
        ("gradients of their inputs", width * gradients, calls * (gradients > 0)),
        ("embeddings", width * tokens, step.packs),
    ]
    if work.head_outputs is None:
        below = work.whole is None or work.whole.below_head
        joined = 4 * step.labels * (HEAD_SUMS + below * work.config.hidden_size)
        label_tiles = max(1, step.labels / schedule.loss_tile_labels)
        found.append(("head", joined, (HEAD_SUMS + below) * label_tiles))
    return [_transfer(layout, what, ALL_REDUCE, "tensor", *of) for what, *of in found]


def outputs_of(work: Workload, schedule: Schedule, tokens: float, labels: float) -> float:
    """Rows of [E] that are summed over `tensor` after o_proj and down_proj. The second run of a
    segment does without its last product; but o_proj's is done again, and summed, where the state
    between attention and MLP was not kept."""
    last = work.config.num_hidden_layers - 1
    total = 0.0
    for layer, keep in enumerate(schedule.keep):
        rows = min(labels, tokens) if layer == last else tokens
        again = 0
        if layer >= work.lowest:
            again += "o_proj" not in keep and ("mid" not in keep or work.needs_output("o_proj"))
            again += "down_proj" not in keep and work.needs_output("down_proj")
        total += (2 + again) * rows
    return total


def inputs_of(work: Workload, schedule: Schedule, tokens: float, labels: float) -> float:
    """Rows of [E] of gradients that are summed over `tensor`: of each MLP's input, and of each
    attention's. Of the lowest attention only where something below it is trained, or where its
    second run is one of all of it, since the state behind it was not kept (model/replay.py)."""
    config, whole = work.config, work.whole or Whole()
    last = config.num_hidden_layers - 1
    below = work.trains_all or whole.embedding or work.new_token_numbers > 0
    total = 0.0
    for layer in range(work.lowest, config.num_hidden_layers):
        total += min(labels, tokens) if layer == last else tokens
        if layer > work.lowest or below or "mid" not in schedule.keep[layer]:
            total += tokens
    return total
