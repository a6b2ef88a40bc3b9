"""The choice of a mesh: the fastest that fits, or the first."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_rank import CONFIG, FULL, ON_GPU, rank

from llamaweft.errors import UserError
from llamaweft.parallel.layout import Layout
from llamaweft.plan.layouts import (
    Choice,
    candidates,
    check_layout,
    choose_layout,
    least_bytes,
    rank_budget,
)

PACKS = {"accumulation": 64, "packs": 6400}


def least(work, layout: Layout) -> int:
    return least_bytes(layout, CONFIG, lambda of: rank(work, of))


def choose(work, budget: int, world: int = 16, per_node: int = 8, **more) -> Choice:
    return choose_layout(
        CONFIG,
        lambda layout: rank(work, layout),
        world=world,
        per_node=per_node,
        budget_bytes=budget,
        **PACKS | more,
    )


def test_candidates_fill_the_world_and_tensor_stays_on_a_machine() -> None:
    found = list(candidates(16, 8))
    assert [str(layout) for layout in found[:6]] == [
        "data 16", "data 8 x shard 2", "data 4 x shard 4", "data 2 x shard 8", "shard 16",
        "data 8 x tensor 2",
    ]  # fmt: skip
    assert {layout.world for layout in found} == {16}
    assert max(layout.tensor for layout in found) == 8
    assert len(set(found)) == len(found)
    assert [str(layout) for layout in candidates(2, 2)] == ["data 2", "shard 2", "tensor 2"]


def test_replicas_where_they_fit() -> None:
    found = choose(ON_GPU, least(ON_GPU, Layout(data=16)))
    assert found.layout == Layout(data=16)
    assert "it is tried first" in found.reason


def test_the_fewest_shards_that_fit_and_why() -> None:
    budget = least(FULL, Layout(data=4, shard=4))
    assert least(FULL, Layout(data=8, shard=2)) > budget
    found = choose(FULL, budget)
    assert found.layout == Layout(data=4, shard=4)
    assert "data 16 would take" in found.reason
    assert f"{budget / 2**30:.2f} GiB at least of {budget / 2**30:.2f} GiB" in found.reason


def test_the_fastest_that_fits_where_the_seconds_are_known() -> None:
    budget = least(FULL, Layout(data=4, shard=4))
    seconds = {Layout(shard=16): 2.0, Layout(data=2, shard=8): 2.0, Layout(data=16): 1.0}
    found = choose(FULL, budget, seconds_of=lambda layout: seconds.get(layout, 3.0))
    assert found.layout == Layout(data=2, shard=8)  # data 16 does not fit; of equals the first
    assert "2 s a step by the plan, the least of" in found.reason
    assert "(shard 16 2 s)" in found.reason


def test_the_only_one_that_fits_needs_no_comparison() -> None:
    layouts = list(candidates(16, 8))
    one = min(layouts, key=lambda layout: least(FULL, layout))
    found = choose(FULL, least(FULL, one), seconds_of=lambda layout: 1.0)
    assert found.layout == one
    assert "the only layout that fits" in found.reason


def test_over_all_machines_only_where_one_machine_is_not_enough() -> None:
    budget = least(FULL, Layout(shard=16))
    assert least(FULL, Layout(data=2, shard=8)) > budget
    assert choose(FULL, budget).layout == Layout(shard=16)


def test_tensor_where_activations_do_not_fit() -> None:
    """A long pack needs memory that no shard spares."""
    long = replace(ON_GPU, pack_tokens=65_536, labels=60_000)
    budget = least(long, Layout(shard=16)) - 1
    found = choose(long, budget)
    assert found.layout.tensor > 1
    assert least(long, found.layout) <= budget


def test_where_nothing_fits_the_least_is_named() -> None:
    with pytest.raises(UserError, match="no layout of 16 ranks fits") as caught:
        choose(FULL, 2**30)
    smallest = min(least(FULL, layout) for layout in candidates(16, 8))
    assert f"the least is {smallest / 2**30:.2f} GiB" in str(caught.value)


def test_layouts_without_a_pack_for_each_rank_are_passed_over() -> None:
    found = choose(ON_GPU, 2**40, accumulation=4)
    assert found.layout == Layout(data=4, tensor=4)
    assert "do not suit the packs" in found.reason
    with pytest.raises(UserError, match="gradient_accumulation_steps: 1"):
        choose(ON_GPU, 2**40, accumulation=1)


def test_layouts_that_the_model_cannot_be_cut_for_are_passed_over() -> None:
    """Three key-value heads are in three parts, and not in two."""
    odd = replace(CONFIG, num_attention_heads=30, num_key_value_heads=3, intermediate_size=3 * 4779)
    work = replace(ON_GPU, config=odd)
    found = choose_layout(
        odd,
        lambda layout: rank(work, layout),
        world=6,
        per_node=6,
        budget_bytes=2**40,
        accumulation=3,
        packs=10,
    )
    assert found.layout == Layout(data=2, tensor=3)  # data 3 x tensor 2 is tried before it


def test_one_process_needs_no_choice() -> None:
    assert choose(ON_GPU, 0, world=1, per_node=1).layout == Layout()


def test_a_named_layout_is_only_checked() -> None:
    layout = Layout(data=2, tensor=8)
    found = check_layout(layout, CONFIG, world=16, **PACKS)
    assert found == Choice(layout, "data 2 x tensor 8: as the recipe says")
    with pytest.raises(UserError, match="16 processes, and 8 were started"):
        check_layout(layout, CONFIG, world=8, **PACKS)
    with pytest.raises(UserError, match="does not divide"):
        check_layout(Layout(tensor=16), CONFIG, world=16, **PACKS)
    with pytest.raises(UserError, match="gradient_accumulation_steps: 1"):
        check_layout(layout, CONFIG, world=16, accumulation=1, packs=100)


def test_processes_that_share_a_memory_share_what_is_free() -> None:
    assert rank_budget(None, 1000, 4) == 250
    assert rank_budget(400, 1000, 4) == 400
