"""Which mesh `parallel: auto` means: of those in which a rank's memory suffices the fastest, or,
where nothing says how fast the links are, the first of those whose ranks depend on each other
least: once a step, for each pack, in each layer.

Pure: the caller says how many ranks there are, how many on a machine, what memory each may take,
what one of them has to do under a layout (plan/rank.py) and, where it is known, how long that takes
(plan/scale.py). So the same choice is made for devices that are not here and for processes that are
about to start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llamaweft.errors import UserError
from llamaweft.model.presets import LlamaConfig
from llamaweft.parallel.layout import Layout, check_model, check_packs, check_world
from llamaweft.plan.memory import Workload, schedule

WorkOf = Callable[[Layout], Workload]
"""What one rank of a layout has to do. May raise UserError where the model cannot be cut so."""

SecondsOf = Callable[[Layout], float]
"""How long a step takes under a layout."""

ONE_PROCESS = "one process"


@dataclass(frozen=True)
class Choice:
    """A mesh and the reason for it, a sentence for a person."""

    layout: Layout
    reason: str


def rank_budget(memory_budget: int | None, free_bytes: int, local_ranks: int) -> int:
    """Bytes that a rank may take: the recipe's training.memory_budget, which bounds one process, or
    an even part of what is free where ranks share a memory, as processes on a CPU do. local_ranks:
    that share it; 1 where each has a device."""
    return memory_budget or free_bytes // local_ranks


def candidates(world: int, per_node: int) -> Iterator[Layout]:
    """Meshes of `world` ranks, `per_node` on a machine, in the order in which they are tried.

    `data` sends the trained gradient once a step; `shard` the weights for each pack, within a
    machine or over all; `tensor` activations in each layer, and never leaves a machine.
    """
    for tensor in _divisors(per_node):
        rest = world // tensor
        for shard in _divisors(per_node // tensor):
            yield Layout(rest // shard, shard, tensor)
        if per_node < world:
            yield Layout(1, rest, tensor)


def choose_layout(
    config: LlamaConfig,
    work_of: WorkOf,
    *,
    world: int,
    per_node: int,
    budget_bytes: int,
    accumulation: int,
    packs: int,
    seconds_of: SecondsOf | None = None,
) -> Choice:
    """Of the `candidates` in which one rank fits its budget the one whose step takes least, and
    why; the first of them where seconds_of is None, and of those that take equally long.

    accumulation: packs of a step over all ranks together. packs: in the whole run. Meshes that the
    model or the packs do not allow are passed over. Raises UserError where none is left, with the
    least memory that a rank would need.
    """
    if world == 1:
        return Choice(Layout(), ONE_PROCESS)
    refused: UserError | None = None
    least: tuple[int, Layout] | None = None
    passed: list[str] = []
    fitting: list[tuple[float, Layout, int]] = []
    for layout in candidates(world, per_node):
        try:
            check_packs(layout, accumulation, packs)
            needed = least_bytes(layout, config, work_of)
        except UserError as error:
            refused = refused or error
            continue
        if needed > budget_bytes:
            passed.append(f"{layout} would take {_gib(needed)}")
            if least is None or needed < least[0]:
                least = needed, layout
        elif seconds_of is None:
            return Choice(layout, _reason(layout, needed, budget_bytes, passed, refused))
        else:
            fitting.append((seconds_of(layout), layout, needed))
    if fitting:
        return _fastest(fitting, budget_bytes)
    if least is None:
        assert refused is not None
        raise refused
    raise UserError(
        f"parallel: no layout of {world} ranks fits: a rank may take {_gib(budget_bytes)}, and the "
        f"least is {_gib(least[0])}, with {least[1]}; use more or larger devices, lower "
        "training.micro_batch_tokens, or set parallel: {shard: N, offload: true}"
    )


def check_layout(
    layout: Layout, config: LlamaConfig, *, world: int, accumulation: int, packs: int
) -> Choice:
    """A mesh that the recipe names, checked. Raises UserError where it has not `world` places, or
    where the model or the packs do not allow it."""
    check_world(layout, world)
    check_model(layout, config)
    check_packs(layout, accumulation, packs)
    return Choice(layout, f"{layout}: as the recipe says")


def least_bytes(layout: Layout, config: LlamaConfig, work_of: WorkOf) -> int:
    """The peak of a rank that keeps nothing that can be computed again. Raises UserError where the
    model cannot be cut so."""
    check_model(layout, config)
    work = work_of(layout)
    return schedule(work, [()] * work.config.num_hidden_layers).peak_bytes


def _fastest(fitting: list[tuple[float, Layout, int]], budget: int) -> Choice:
    """fitting: seconds, layout, least bytes of a rank, in the order in which they were tried."""
    seconds, layout, needed = min(fitting, key=lambda one: one[0])
    takes = f"a rank takes {_gib(needed)} at least of {_gib(budget)}"
    others = [(taken, other) for taken, other, _ in fitting if other != layout]
    if not others:
        return Choice(layout, f"{layout}: the only layout that fits; {takes}")
    next_seconds, other = min(others, key=lambda one: one[0])
    return Choice(
        layout,
        f"{layout}: {seconds:.3g} s a step by the plan, the least of {len(fitting)} layouts that "
        f"fit ({other} {next_seconds:.3g} s); {takes}",
    )


def _reason(
    layout: Layout, needed: int, budget: int, passed: list[str], refused: UserError | None
) -> str:
    takes = f"a rank takes {_gib(needed)} at least of {_gib(budget)}"
    if not passed and refused is None:
        return f"{layout}: {takes}, and it is tried first"
    why = list(passed)
    if refused is not None:
        why.append("others do not suit the packs or the model")
    return f"{layout}: {takes}, and what is tried before it does not do: {'; '.join(why)}"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
