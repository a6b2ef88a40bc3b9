"""Bytes of a step: by hand from the shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_rank import (
    ATTENTION,
    FULL,
    HIDDEN,
    INNER,
    KEYS,
    LAYERS,
    MLP,
    ON_GPU,
    TIED,
    VOCABULARY,
    rank,
)

from llamaweft.parallel.layout import Layout
from llamaweft.plan.communication import Transfer, communication
from llamaweft.plan.devices import CALL_SECONDS, LINK_REACHED, find_machines
from llamaweft.plan.memory import schedule, solve
from llamaweft.plan.time import StepWork
from llamaweft.plan.whole import Whole

STEP = StepWork(tokens=1800, labels=900, squares=300_000, packs=2)
ADAPTER = LAYERS * 16 * (7 * HIDDEN + (HIDDEN + 2 * KEYS + 2 * INNER) + (HIDDEN + INNER))
MATRICES = LAYERS * (ATTENTION + MLP) + 2 * VOCABULARY * HIDDEN
NORMS = HIDDEN * (2 * LAYERS + 1)


def sent(work, layout: Layout, keep=None, codec: str = "bf16") -> dict[tuple[str, str], Transfer]:
    """By kind and group; one of each, or the sum would be hidden."""
    of = rank(work, layout, codec)
    made = solve(of, None) if keep is None else schedule(of, keep)
    found = communication(of, layout, made, codec, STEP)
    by = {(t.what, t.group): t for t in found}
    assert len(by) == len(found)
    return by


def test_one_process_sends_nothing() -> None:
    assert sent(ON_GPU, Layout()) == {}


def test_replicas_of_an_adapter_send_its_gradient_once() -> None:
    (found,) = sent(ON_GPU, Layout(data=8)).values()
    assert (found.kind, found.group, found.ranks) == ("all-reduce", "data x shard", 8)
    assert (found.payload_bytes, found.calls) == (4 * ADAPTER, 1)


def test_frozen_shards_are_gathered_for_each_pack_twice_but_for_both_ends() -> None:
    """Not again: the embedding, which no gradient comes to; the last layer and the head, which the
    backward pass begins with."""
    found = sent(ON_GPU, Layout(data=2, shard=4))
    assert set(found) == {("gradients", "data x shard"), ("weights", "shard")}
    gathered = found["weights", "shard"]
    layer = ATTENTION + MLP
    once = LAYERS * layer + 2 * VOCABULARY * HIDDEN
    assert gathered.payload_bytes == 2 * 2 * (once + (LAYERS - 1) * layer)
    assert (gathered.kind, gathered.ranks, gathered.stride) == ("all-gather", 4, 1)
    assert gathered.wire_bytes == 3 / 4 * gathered.payload_bytes
    assert found["gradients", "data x shard"].ranks == 8


def test_trained_shards_are_summed_for_each_pack_and_over_replicas_once() -> None:
    found = sent(FULL, Layout(data=2, shard=4))
    layer, end = ATTENTION + MLP, VOCABULARY * HIDDEN
    gathered = LAYERS * layer + (LAYERS - 1) * layer + 2 * end + end
    assert found["weights", "shard"].payload_bytes == 2 * 4 * gathered
    summed = found["gradients", "shard"]
    assert (summed.kind, summed.payload_bytes) == ("reduce-scatter", 2 * 4 * MATRICES)
    assert found["gradients of shards", "data"].payload_bytes == 4 * MATRICES / 4
    assert found["gradients of shards", "data"].stride == 4
    assert found["gradients", "data x shard"].payload_bytes == 4 * NORMS


def test_a_tied_matrix_is_summed_once_a_step() -> None:
    found = sent(replace(FULL, config=TIED), Layout(shard=4))
    assert found["gradients", "data x shard"].payload_bytes == 4 * (NORMS + VOCABULARY * HIDDEN)
    assert found["gradients", "shard"].payload_bytes == 2 * 4 * LAYERS * (ATTENTION + MLP)


def test_tensor_ranks_sum_two_outputs_and_two_gradients_a_layer() -> None:
    """The last layer has rows of labels only, but for its attention's input; nothing below the
    lowest one's wants a gradient."""
    found = sent(ON_GPU, Layout(tensor=4))
    width = 2 * HIDDEN
    assert found["outputs of layers", "tensor"].payload_bytes == width * (62 * 1800 + 2 * 900)
    inputs = found["gradients of their inputs", "tensor"].payload_bytes
    assert inputs == width * (31 * 1800 + 900 + 31 * 1800)
    assert found["embeddings", "tensor"].payload_bytes == width * 1800
    assert found["head", "tensor"].payload_bytes == 4 * 900 * (3 + HIDDEN)
    full = sent(FULL, Layout(tensor=4))["gradients of their inputs", "tensor"].payload_bytes
    assert full == inputs + width * 1800


def test_what_was_not_kept_between_attention_and_mlp_is_summed_again() -> None:
    least = sent(ON_GPU, Layout(tensor=4), [()] * LAYERS)
    kept = sent(ON_GPU, Layout(tensor=4), [("mid",)] * LAYERS)
    key = "outputs of layers", "tensor"
    more = 2 * HIDDEN * (31 * 1800 + 900)
    assert least[key].payload_bytes == kept[key].payload_bytes + more
    key = "gradients of their inputs", "tensor"  # of the lowest attention's too
    assert least[key].payload_bytes == kept[key].payload_bytes + 2 * HIDDEN * 1800


def test_halves_that_tensor_leaves_whole_are_summed_over_all_ranks() -> None:
    found = sent(ON_GPU, Layout(data=2, tensor=4))
    uncut = LAYERS * 16 * 7 * HIDDEN
    assert found["gradients of uncut halves", "all"].payload_bytes == 4 * uncut
    assert found["gradients of uncut halves", "all"].ranks == 8
    cut = LAYERS * 16 * (HIDDEN + 2 * KEYS + 2 * INNER + HIDDEN + INNER) // 4
    assert found["gradients", "data x shard"].payload_bytes == 4 * cut
    assert found["gradients", "data x shard"].stride == 4


def test_a_mesh_of_shard_and_tensor_gathers_its_part_only() -> None:
    both, one = sent(ON_GPU, Layout(shard=2, tensor=4)), sent(ON_GPU, Layout(shard=2))
    key = "weights", "shard"
    assert both[key].payload_bytes == pytest.approx(one[key].payload_bytes / 4)
    assert (both[key].ranks, both[key].stride) == (2, 4)


def test_layers_below_the_lowest_trained_one_are_gathered_once() -> None:
    whole = Whole(parameters=HIDDEN, largest=HIDDEN, lowest=30)
    found = sent(replace(ON_GPU, rank=None, targets=(), whole=whole), Layout(shard=2))
    layer = ATTENTION + MLP
    gathered = LAYERS * layer + 2 * VOCABULARY * HIDDEN + layer  # layer 30 again, 31 is there
    assert found["weights", "shard"].payload_bytes == 2 * 2 * gathered


def test_a_tasks_own_head_joins_nothing() -> None:
    work = replace(ON_GPU, head_outputs=3)
    assert ("head", "tensor") not in sent(work, Layout(tensor=4))
    layer = ATTENTION + MLP
    gathered = (2 * LAYERS - 1) * layer + VOCABULARY * HIDDEN
    assert sent(work, Layout(shard=4))["weights", "shard"].payload_bytes == 2 * 2 * gathered


def test_offloaded_parts_cross_the_hosts_link() -> None:
    found = sent(FULL, Layout(shard=4, offload=True))
    moved = found["parts of weights", "host"].payload_bytes
    both = found["weights", "shard"].payload_bytes + found["gradients", "shard"].payload_bytes
    assert moved == both / 4


def test_a_ring_sends_nearly_twice_for_a_sum_and_once_for_the_others() -> None:
    def ring(kind: str, ranks: int) -> float:
        return Transfer("", kind, "data", ranks, 1, 120.0, 1).wire_bytes

    assert ring("all-reduce", 4) == 180
    assert ring("all-gather", 4) == ring("reduce-scatter", 4) == 90
    assert ring("all-reduce", 2) == 120


def test_seconds_are_those_of_the_slowest_link_of_a_ring() -> None:
    machines = find_machines("16xh100", nodes=2, node_gbit=800)

    def seconds(stride: int, ranks: int) -> float:
        return Transfer("", "all-gather", "", ranks, stride, 1e9, 3).seconds(machines)

    def at(rate: float, ranks: int) -> float:
        return 1e9 * (ranks - 1) / ranks / (LINK_REACHED * rate) + 3 * CALL_SECONDS

    assert seconds(1, 8) == pytest.approx(at(450e9, 8))
    assert seconds(4, 2) == pytest.approx(at(450e9, 2))
    assert seconds(1, 16) == pytest.approx(at(100e9, 16))  # all of a machine's network
    assert seconds(8, 2) == pytest.approx(at(100e9 / 8, 2))  # eight such rings share it
    assert seconds(2, 8) == pytest.approx(at(100e9 / 2, 8))  # two do
