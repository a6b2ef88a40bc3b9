"""A step on many devices: what the table's figures are made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_rank import FULL, ON_GPU, rank
from test_time import SPEED

from llamaweft.errors import UserError
from llamaweft.parallel.layout import Layout
from llamaweft.plan.communication import communication
from llamaweft.plan.devices import DEVICES, device_called, find_machines
from llamaweft.plan.memory import solve
from llamaweft.plan.rank import rank_step
from llamaweft.plan.scale import Option, Refused, Scale, assumptions
from llamaweft.plan.time import StepWork, step_seconds

MACHINES = find_machines("16xh100", nodes=2)
STEP = StepWork(tokens=16_000, labels=8_000, squares=4_000_000, packs=16)
ROOM = 79 * 10**9


def scale(work=ON_GPU, **more) -> Scale:
    made = Scale(
        MACHINES, work, "bf16", STEP, SPEED, accumulation=16, packs=1600, budget_bytes=ROOM
    )
    return replace(made, **more)


def test_seconds_are_those_of_a_ranks_own_work_and_of_what_it_sends() -> None:
    layout = Layout(data=2, shard=4, tensor=2)
    found = scale().option(layout)
    work, step = rank(ON_GPU, layout, packs=16), rank_step(STEP, layout)
    assert step.packs == 2
    computed = step_seconds(work, solve(work, ROOM), step, SPEED)
    assert {k: v for k, v in found.seconds.items() if k != "communication"} == computed
    sent = communication(work, layout, found.schedule, "bf16", step)
    assert found.seconds["communication"] == sum(t.seconds(MACHINES) for t in sent)
    assert found.payload_bytes == sum(t.payload_bytes for t in sent)


def test_efficiency_is_one_devices_time_over_that_of_all() -> None:
    alone = sum(step_seconds(ON_GPU, solve(ON_GPU, None), STEP, SPEED).values())
    for layout in (Layout(data=16), Layout(data=8, tensor=2)):
        found = scale().option(layout)
        assert found.efficiency == pytest.approx(alone / (16 * sum(found.seconds.values())))
        assert 0.5 < found.efficiency < 1


def test_a_rank_that_waits_for_one_with_more_packs_is_not_efficient() -> None:
    uneven = replace(STEP, packs=17)
    assert scale(step=uneven, accumulation=17).option(Layout(data=16)).efficiency < 0.55


def test_calls_are_made_for_each_pack() -> None:
    one, two = (
        step_seconds(ON_GPU, solve(ON_GPU, None), replace(STEP, packs=packs), SPEED)
        for packs in (1, 2)
    )
    assert two["calls"] == 2 * one["calls"]
    assert two["products"] == one["products"]


def test_the_slower_the_network_the_longer_what_leaves_a_machine() -> None:
    slow = find_machines("16xh100", nodes=2, node_gbit=10)
    within, across = Layout(data=1, shard=8, tensor=2), Layout(data=16)
    assert (
        scale(machines=slow).option(across).seconds["communication"]
        > 10 * (scale().option(across).seconds["communication"])
    )
    inside = [t for t in scale().option(within).transfers if t.group == "tensor"]
    assert inside
    assert all(t.seconds(slow) == t.seconds(MACHINES) for t in inside)


@pytest.mark.parametrize("gbit", [None, 10])
def test_auto_is_the_fastest_of_those_that_fit(gbit: float | None) -> None:
    machines = find_machines("16xh100", nodes=2, node_gbit=gbit)
    of = scale(FULL, machines=machines, budget_bytes=60 * 10**9)
    options = [o for o in of.options(Layout(shard=16)) if isinstance(o, Option) and o.fits]
    fastest = min(options, key=lambda option: sum(option.seconds.values()))
    assert of.choose(None).layout == fastest.layout


def test_a_slow_network_keeps_weights_within_a_machine() -> None:
    fast, slow = (
        scale(
            FULL,
            machines=find_machines("16xh100", nodes=2, node_gbit=gbit),
            budget_bytes=60 * 10**9,
        ).choose(None)
        for gbit in (None, 10)
    )
    assert fast.layout != slow.layout
    assert slow.layout.data == 2


def test_devices_by_what_their_driver_calls_them() -> None:
    for reported, name in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ):
        assert device_called(reported) is DEVICES[name], reported
    for reported in ("NVIDIA H100 PCIe", "NVIDIA A100-PCIE-40GB", "NVIDIA L40", "AMD MI300X"):
        assert device_called(reported) is None, reported


def test_what_does_not_fit_is_told_with_the_least_that_it_would_take() -> None:
    found = scale(FULL, budget_bytes=40 * 10**9)
    refused = found.option(Layout(data=16))
    assert not refused.fits
    assert refused.schedule.peak_bytes > 40 * 10**9
    fitting = found.option(Layout(shard=16))
    assert fitting.fits
    assert fitting.schedule.peak_bytes <= 40 * 10**9


def test_all_layouts_are_listed_or_it_is_said_why_not() -> None:
    found = scale(accumulation=8).options(Layout(data=8, tensor=2))
    refused = {str(of.layout): of.why for of in found if isinstance(of, Refused)}
    assert "gradient_accumulation_steps: 8" in refused["data 16"]
    listed = {str(of.layout) for of in found if isinstance(of, Option)}
    assert "data 8 x tensor 2" in listed
    assert not listed & refused.keys()


def test_a_named_layout_that_is_no_candidate_is_listed_first() -> None:
    layout = Layout(shard=16, offload=True)
    found = scale().options(layout)
    assert found[0].layout == layout
    assert found[0].to_dict()["host_bytes"] > 0
    assert "host" in found[0].seconds


def test_machines_by_name() -> None:
    found = find_machines("64xH100", nodes=8)
    assert (found.device, found.count, found.per_node) == (DEVICES["h100"], 64, 8)
    assert found.network_gbit == 8 * 400
    assert find_machines("t4").count == 1
    for wrong, said in (
        ("64", "give a number and a device"),
        ("0xt4", "give a number and a device"),
        ("4xt5", "t5 is unknown"),
        ("2xcpu", "no data sheet says how fast a CPU is"),
    ):
        with pytest.raises(UserError, match=said):
            find_machines(wrong)
    with pytest.raises(UserError, match="do not fill 3 machines evenly"):
        find_machines("64xh100", nodes=3)


def test_assumptions_name_the_links_that_are_there() -> None:
    said = "; ".join(assumptions(MACHINES))
    assert "NVLink" in said
    assert "3,200 Gbit/s" in said
    assert "assumed" in said
    one = "; ".join(assumptions(find_machines("4xt4")))
    assert "PCIe 3 x16" in one
    assert "Gbit" not in one
    asked = "; ".join(assumptions(find_machines("16xh100", nodes=2, node_gbit=100)))
    assert "100 Gbit/s of network one way for each machine, as asked for" in asked
