"""`llamaweft plan`: memory, time and tokens of a run, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from llamaweft.cli.terminal import JsonFlag, duration, facts, gib, out, print_json, table
from llamaweft.errors import UserError
from llamaweft.recipe import Recipe

if TYPE_CHECKING:
    from llamaweft.pieces.pieces import Pieces

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="h100, a100, l4, t4, ...: by its data sheet, not measured.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="Several of one kind, such as 64xh100: by data sheets.")
    ] = None,
    nproc: Annotated[
        int, typer.Option(help="Processes on this machine that share the run.", min=1)
    ] = 1,
    nodes: Annotated[int, typer.Option(help="Machines that --devices are in, evenly.", min=1)] = 1,
    network_gbit: Annotated[
        float | None,
        typer.Option(help="Gbit/s of each machine's network, one way; left out, assumed.", min=0.1),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(help="What an hour of a device costs; the plan says the run's cost.", min=0),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Peak memory by part, seconds a step, total time and tokens; what was chosen and why."""
    from llamaweft.plan.devices import find_device, find_machines
    from llamaweft.planning import PiecesFor, PiecesForMany, plan_run, scale_of

    _check_options(device, devices, nproc, nodes, network_gbit)
    loaded = Recipe.load(recipe, overrides or [])
    if devices:
        many = PiecesForMany(loaded, find_machines(devices, nodes, network_gbit))
        content = plan_run(many, price_per_hour).to_dict() | scale_of(many)
    else:
        pieces = PiecesFor(loaded, find_device(device)) if device else _here(loaded, nproc)
        content = plan_run(pieces, price_per_hour).to_dict()
    if json_output:
        print_json(content)
        return
    print_plan(content)
    if devices:
        print_layouts(content)


def _here(loaded: Recipe, nproc: int) -> Pieces:
    """The pieces of a run on this machine; of several processes those of one rank."""
    from llamaweft.layouts import layout_of
    from llamaweft.parallel.layout import check_world
    from llamaweft.parallel.ranks import Ranks
    from llamaweft.pieces.pieces import Pieces
    from llamaweft.runtime import share_cores

    layout, reason = layout_of(loaded, nproc, nproc)
    if nproc > 1:
        check_world(layout, nproc)
    share_cores(layout.world)
    return Pieces(loaded, Ranks(layout, on_machine=layout.world, reason=reason, planned=True))


def _check_options(
    device: str | None, devices: str | None, nproc: int, nodes: int, network_gbit: float | None
) -> None:
    if device and devices:
        raise UserError("--device and --devices say the same; remove one of them")
    if (device or devices) and nproc > 1:
        raise UserError("--nproc is of this machine; use --devices for several that are not here")
    if nodes > 1 and not devices:
        raise UserError(f"--nodes {nodes} is of several devices; give --devices, such as 64xh100")
    if network_gbit is not None and nodes == 1:
        raise UserError("--network-gbit is of the network between machines; give --nodes too")


def print_plan(content: dict[str, Any]) -> None:
    parts = [f"{gib(size)} {name}" for name, size in content["parts"].items() if size]
    shares = [f"{s / content['seconds_per_step']:.0%} {n}" for n, s in content["seconds"].items()]
    verdict = "fits" if content["fits"] else "does not fit"
    many = "devices" in content
    rows = {
        **content["decisions"],
        "memory": f"{gib(content['peak_bytes'])} at its peak{' on each device' * many}, {verdict} "
        f"in {gib(content['budget_bytes'])} ({', '.join(parts)})",
        "length": f"{content['steps']} steps, {content['tokens']:,} tokens, "
        f"{content['packs_per_epoch']} packs an epoch",
        "time": f"about {duration(content['total_seconds'])}, "
        f"{content['seconds_per_step']:.2f} s a step, {content['tokens_per_second']:.1f} tokens/s: "
        f"training alone ({', '.join(shares)})",
        "speed": f"{content['speed']['product_flops'] / 1e9:,.0f} GFLOP/s of the base's products, "
        f"{content['speed']['source']}",
    }
    if many:
        rows["efficiency"] = (
            f"{content['efficiency']:.0%} of what {content['devices']} devices could do if nothing "
            "were sent, waited for or computed again; reckoned, not measured"
        )
    if content.get("host_bytes"):
        rows["host"] = f"{gib(content['host_bytes'])} of the host's memory for each device"
    if content["cost"] is not None:
        each = f"{content['price_per_hour']:,.2f} an hour" + " for each device" * many
        rows["cost"] = f"{content['cost']:,.2f} at {each}"
    for number, warning in enumerate(content["warnings"], start=1):
        rows[f"note {number}"] = warning
    out.print(facts("The plan", rows))


def print_layouts(content: dict[str, Any]) -> None:
    """The layouts there are, what each costs, and what that rests on."""
    made = table(
        "Layouts", "", "layout", "memory a rank", "fits",
        "sent a step", "s a step", "efficiency",
    )  # fmt: skip
    why_not: dict[str, list[str]] = {}
    for of in content["layouts"]:
        if "why_not" in of:
            why_not.setdefault(of["why_not"], []).append(of["layout"])
            continue
        made.add_row(
            "*" if of["layout"] == content["layout"] else "",
            escape(of["layout"]),
            gib(of["peak_bytes"]),
            "yes" if of["fits"] else "no",
            _sent(of["wire_bytes"]),
            f"{of['seconds_per_step']:.3f}" if of["fits"] else "",
            f"{of['efficiency']:.0%}" if of["fits"] else "",
        )
    out.print(made)
    rows = {"assumed": "; ".join(content["assumptions"])}
    rows["sent"] = "what each rank sends in rings, a mean step"
    for number, (why, layouts) in enumerate(why_not.items(), start=1):
        rows[f"not possible {number}"] = f"{', '.join(layouts)}: {why}"
    out.print(facts("", rows))


def _sent(count: float) -> str:
    """In powers of ten, as networks are counted."""
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / size:,.2f} {unit}"
