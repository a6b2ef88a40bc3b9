"""What one rank has of a model: counted by hand from the shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_plan import WORK

from llamaweft.errors import UserError
from llamaweft.model.stores import store_bytes
from llamaweft.parallel.layout import Layout
from llamaweft.plan.memory import (
    adapter_parameters,
    held_parameter_count,
    schedule,
    solve,
    trained_parameter_count,
)
from llamaweft.plan.rank import host_bytes, of_rank, rank_config, rank_step, units
from llamaweft.plan.time import StepWork
from llamaweft.plan.whole import Whole

HIDDEN, INNER, KEYS, LAYERS, VOCABULARY = 4096, 14336, 1024, 32, 128256
ATTENTION, MLP = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS, 3 * HIDDEN * INNER
NORMS = 4 * HIDDEN * (2 * LAYERS + 1)
CONFIG = WORK.config
ON_GPU = replace(WORK, compute_bytes=2, weight_bytes=store_bytes(CONFIG, "bf16"))
FULL = replace(ON_GPU, rank=None, targets=(), weight_bytes=0)
TIED = replace(CONFIG, tie_word_embeddings=True)


def rank(work, layout: Layout, codec: str = "bf16", **more):
    return of_rank(work, layout, codec, **{"mapped": False, **more})


def test_one_process_is_as_it_was() -> None:
    assert rank(ON_GPU, Layout(), packs=1) is ON_GPU


def test_a_tensor_rank_has_its_part_of_heads_features_and_vocabulary() -> None:
    config = rank_config(CONFIG, Layout(tensor=4))
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 2)
    assert (config.intermediate_size, config.vocab_size) == (INNER // 4, VOCABULARY // 4)
    assert (config.hidden_size, config.head_dim) == (HIDDEN, 128)
    with pytest.raises(UserError, match="num_key_value_heads"):
        rank_config(CONFIG, Layout(tensor=16))


def test_a_tensor_rank_holds_its_half_of_an_adapter_whole_and_the_other_cut() -> None:
    """lora_A of what is cut by outputs sees the whole hidden state, lora_B of it makes a part."""
    found = rank(ON_GPU, Layout(tensor=4))
    outputs = (HIDDEN + 2 * KEYS + 2 * INNER) // 4  # q, k, v, gate, up
    inputs = (HIDDEN + INNER) // 4  # o, down
    assert adapter_parameters(found) == LAYERS * 16 * (5 * HIDDEN + outputs + 2 * HIDDEN + inputs)


def test_frozen_bytes_are_divided_by_shard_and_tensor_but_for_norms() -> None:
    matrices = 2 * (LAYERS * (ATTENTION + MLP) + 2 * VOCABULARY * HIDDEN)
    assert ON_GPU.weight_bytes == matrices + NORMS
    for layout in (Layout(shard=8), Layout(tensor=4), Layout(shard=8, tensor=4)):
        parts = layout.shard * layout.tensor
        assert rank(ON_GPU, layout).weight_bytes == matrices // parts + NORMS
    assert rank(ON_GPU, Layout(data=8)).weight_bytes == ON_GPU.weight_bytes


def test_a_tied_matrix_stays_on_every_rank_under_shard() -> None:
    tied = replace(ON_GPU, config=TIED, weight_bytes=store_bytes(TIED, "bf16"))
    layers = 2 * LAYERS * (ATTENTION + MLP)
    one = 2 * VOCABULARY * HIDDEN
    assert rank(tied, Layout(shard=8)).weight_bytes == layers // 8 + one + NORMS
    assert {unit.name for unit in units(tied, "bf16")} == {"self_attn", "mlp"}


def test_mapped_weights_take_memory_where_they_are_sharded_or_cut_by_columns() -> None:
    on_cpu = replace(WORK, weight_bytes=0)
    assert rank(on_cpu, Layout(data=2), mapped=True).weight_bytes == 0
    columns = LAYERS * (HIDDEN * HIDDEN + INNER * HIDDEN)  # of o and down, in two bytes, by two
    assert rank(on_cpu, Layout(tensor=2), mapped=True).weight_bytes == columns
    found = rank(on_cpu, Layout(shard=2), mapped=True)
    assert found.weight_bytes == LAYERS * (ATTENTION + MLP) + 2 * VOCABULARY * HIDDEN


def test_codecs_are_sharded_as_they_are_stored() -> None:
    """nf4: half a byte, a code for 64, an fp32 scale for 256 of those; its embedding in int8."""
    nf4 = sum(
        n // 2 + n // 64 + 4 * (n // 64 // 256) + 4
        for n in 2 * [HIDDEN * HIDDEN] + 2 * [HIDDEN * KEYS] + 3 * [HIDDEN * INNER]
    )
    end = VOCABULARY * HIDDEN + 4 * VOCABULARY * HIDDEN // 64
    found = units(ON_GPU, "nf4")
    assert sum(unit.frozen_bytes for unit in found) == LAYERS * nf4 + 2 * end
    assert store_bytes(CONFIG, "nf4") == LAYERS * nf4 + 2 * end + NORMS


def test_full_fine_tuning_holds_and_steps_its_own_part() -> None:
    found = rank(FULL, Layout(data=2, shard=8))
    matrices = LAYERS * (ATTENTION + MLP) + 2 * VOCABULARY * HIDDEN
    own = matrices // 8 + HIDDEN * (2 * LAYERS + 1)
    assert trained_parameter_count(found) == trained_parameter_count(FULL)
    assert held_parameter_count(found) == own
    parts = schedule(found, [()] * LAYERS).parts
    assert (parts["trained"], parts["gradients"], parts["optimizer"]) == (4 * own, 4 * own, 8 * own)
    assert parts["weights"] == 0


def test_what_is_whole_for_a_moment_is_counted() -> None:
    """A frozen layer, and the head twice while it is gathered; of a trained one the gradient's
    copy, too, is as large."""
    layer, head = ATTENTION + MLP, VOCABULARY * HIDDEN
    frozen, full = rank(ON_GPU, Layout(shard=8)), rank(FULL, Layout(shard=8))
    assert frozen.gathered_bytes == 2 * layer + 2 * 2 * head
    assert full.gathered_bytes == 4 * layer + 2 * 4 * head
    tied = rank(replace(FULL, config=TIED), Layout(shard=8))
    assert tied.gathered_bytes == 4 * layer + 2 * 4 * MLP
    assert schedule(frozen, [()] * LAYERS).parts["gathered"] == frozen.gathered_bytes
    assert rank(ON_GPU, Layout(data=8)).gathered_bytes == 0


def test_offloaded_states_lie_in_the_hosts_memory() -> None:
    there, here = Layout(shard=8, offload=True), Layout(shard=8)
    matrices = LAYERS * (ATTENTION + MLP) + 2 * VOCABULARY * HIDDEN
    work = rank(FULL, there)
    assert held_parameter_count(work) == HIDDEN * (2 * LAYERS + 1)
    assert host_bytes(work, there, "fp32") == 16 * matrices // 8
    assert host_bytes(rank(FULL, here), here, "fp32") == 0
    assert rank(ON_GPU, there).weight_bytes == NORMS


def test_cut_widths_make_activations_smaller_and_the_hidden_width_stays() -> None:
    """Kept: queries, keys, gate and up are cut; the layers' inputs and the state between are not.
    A GPU keeps no attention."""
    work = replace(ON_GPU, keeps_attention=False)
    one, four = (
        solve(of, None).parts["activations"] for of in (work, rank(work, Layout(tensor=4)))
    )
    tokens, labels = WORK.pack_tokens, WORK.labels
    cut = 31 * tokens * (HIDDEN + 2 * KEYS + 2 * INNER)
    cut += labels * (HIDDEN + 2 * INNER) + tokens * 2 * KEYS
    assert one - four == 2 * (cut - cut // 4)


def test_gradients_are_held_between_packs_only_where_a_rank_has_several() -> None:
    assert rank(ON_GPU, Layout(data=4), packs=4).accumulates is False
    assert rank(ON_GPU, Layout(data=4), packs=5).accumulates is True
    assert rank(ON_GPU, Layout(data=2, tensor=2), packs=4).accumulates is True


def test_parts_that_are_trained_whole_are_cut_too() -> None:
    q = HIDDEN * HIDDEN
    whole = Whole(parameters=q + HIDDEN, largest=q, linears=((31, "q_proj"),), lowest=31)
    part = replace(ON_GPU, rank=None, targets=(), whole=whole)
    found = rank(part, Layout(tensor=4)).whole
    assert found is not None
    assert (found.parameters, found.largest) == (q // 4 + HIDDEN, q // 4)
    sharded = rank(part, Layout(shard=4))
    assert held_parameter_count(sharded) == q // 4 + HIDDEN


def test_the_rank_with_the_most_packs_decides() -> None:
    step = StepWork(tokens=1000, labels=500, squares=100_000, packs=10)
    assert rank_step(step, Layout(data=4, tensor=2)) == StepWork(300, 150, 30_000, 3)
    assert rank_step(step, Layout(data=5)) == StepWork(200, 100, 20_000, 2)
