"""The engine and its peers, side by side: real tokens a second, memory, share of sgemm.

    python -m benchmarks.bench_engine slice       two layers of Llama 3 8B with its whole head
    python -m benchmarks.bench_engine prefixes    the same, all rows with one system message
    python -m benchmarks.bench_engine embedded    SmolLM2-135M, as the demo trains it
    python -m benchmarks.bench_engine whole8b     all 32 layers: --peer, --cgroup 4GiB
    python -m benchmarks.bench_engine all

Contenders take their steps in turn, A B A B, so that a drifting machine drifts for both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import data, models, peer_choice, report
from benchmarks.contender import ROOT, Contender, Entry
from benchmarks.memory_limit import Group, drop_cached, memory_limit
from benchmarks.sgemm import Sgemm, model_shapes
from llamaweft.errors import RunError, UserError
from llamaweft.model.stores import cached_store
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.runtime import cache_dir
from llamaweft.settings import parse_bytes

BUDGETS = ("3GiB", "9GiB")
LIMITED_BUDGET = "2.5GiB"
"""training.memory_budget of the whole 8B: without a limit, and inside --cgroup."""

SYSTEM_TOKENS = 512
"""Of the system message that all rows of `prefixes` share."""


@dataclass
class Ring:
    """A model and its rows, cut for one length of packs, and what was measured on them."""

    options: argparse.Namespace
    model: Path
    pack_tokens: int
    base_weights: str
    chats: Path | None = None
    ratios: dict[str, str] = field(default_factory=dict)
    contenders: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        work: Path = self.options.work
        chats = self.chats or self.options.data or data.write_chats(work / "chats.jsonl")
        folder = work / f"{self.model.name}-{chats.stem}"
        self.chats, self.tokens = data.write_pieces(
            chats, load_tokenizer(self.model), self.pack_tokens, folder
        )
        self.rows = data.describe(self.tokens)
        self.logs = work / "logs"

    @cached_property
    def sgemm(self) -> Sgemm:
        """Made when it is first asked for: its matrices take memory."""
        return Sgemm(model_shapes(self.model, self.rows["trained_share"]), self.pack_tokens)

    def ours(self, budget: str | None, group: Group | None = None) -> Entry:
        settings = {
            "model": str(self.model),
            "chats": str(self.chats),
            "pack_tokens": self.pack_tokens,
            "accumulation": 1,
            "base_weights": self.base_weights,
            "memory_budget": budget,
            "compute_dtype": self.options.compute_dtype,
        }
        name = f"llamaweft {self.base_weights} {budget or ''}".strip()
        name += self._dtype
        name += " limited" if group else ""
        return Entry(f"{name} @{self.pack_tokens}", "benchmarks.engine", settings, {}, group)

    def peer(self, choice: peer_choice.Choice) -> Entry:
        entry = choice.entry(self.model, self.tokens, self.pack_tokens)
        settings = entry.settings | {"compute_dtype": self.options.compute_dtype}
        return replace(entry, name=entry.name.replace(" @", f"{self._dtype} @"), settings=settings)

    @property
    def _dtype(self) -> str:
        return "" if self.options.compute_dtype == "fp32" else f" in {self.options.compute_dtype}"

    @contextmanager
    def fight(self, entry: Entry) -> Iterator[Callable[[Entry | None, int], None]]:
        """Ours, alive; the function steps it in turn with a peer, or alone, for some rounds."""
        with Contender(entry, self.logs) as ours:
            rates = [self.sgemm.measure_both()]

            def rounds(peer: Entry | None, count: int) -> None:
                if peer is None:
                    for _ in range(count):
                        ours.step()
                        rates.append(self.sgemm.measure_both())
                    return
                with Contender(peer, self.logs) as theirs:
                    for _ in range(count):
                        ours.step()
                        rates.append(self.sgemm.measure_both())
                        theirs.step()
                    self._compare(ours, theirs)

            yield rounds
            self.contenders.append(report.figures(ours, rates))

    def _compare(self, ours: Contender, theirs: Contender) -> None:
        found = report.figures(theirs)
        times = report.ratio(ours.steps[-len(theirs.steps) :], theirs.steps)
        memory = report.figures(ours)["peak_anon_bytes"] / found["peak_anon_bytes"]
        self.contenders.append(found)
        self.ratios[f"to {found['name']}"] = f"{times:.2f} x its tok/s, {memory:.2f} x its memory"

    def compare_apart(self, theirs: dict[str, Any]) -> None:
        """The last of ours with a peer that ran before it, each by the sgemm of its own time."""
        ours = self.contenders[-1]
        name = f"{ours['name']} to {theirs['name']}"
        rate = ours["real_tokens_per_second"] / mean(ours["sgemm_flops_per_second"]) * 1e12
        times = rate / theirs["real_tokens_per_tflop_of_sgemm"]
        memory = ours["peak_anon_bytes"] / theirs["peak_anon_bytes"]
        if theirs not in self.contenders:
            self.contenders.insert(0, theirs)
        self.ratios[name] = (
            f"{times:.2f} x its tok/s at the same sgemm, one after the other; "
            f"{memory:.2f} x its memory"
        )

    def case(self, title: str, **more: Any) -> dict[str, Any]:
        return {
            "title": f"{title}, packs of {self.pack_tokens} tokens",
            "data": self.rows,
            "contenders": self.contenders,
            "ratios": self.ratios,
            **more,
        }


def against_tuned(
    ring: Ring, title: str, choices: list[peer_choice.Choice]
) -> Iterator[dict[str, Any]]:
    """Tune the peer with NF4 and without, then fight both bests and its defaults. With
    --settled the first setting is taken untuned."""
    tried, bests = [], []
    for nf4 in (True, False):
        entries = [ring.peer(choice) for choice in choices if choice.nf4 == nf4]
        if ring.options.settled:
            bests.append(entries[0])
            continue
        best, figures = peer_choice.fastest(entries, ring.sgemm, ring.logs)
        bests.append(best)
        tried += figures
    with ring.fight(ring.ours(ring.options.memory_budget)) as rounds:
        for best in [*bests, *(ring.peer(choice) for choice in peer_choice.PLAIN)]:
            rounds(best, ring.options.rounds)
        if not ring.options.skip_defaults:
            rounds(ring.peer(peer_choice.DEFAULTS), max(1, ring.options.rounds // 2))
    yield ring.case(title, peer_settings_tried=tried)


def bench_slice(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = models.llama3_folder(options.work, layers=2)
    weights = options.base_weights or "nf4"
    title = "Llama 3 8B, two layers and head"
    yield from against_tuned(Ring(options, model, 1024, weights), title, peer_choice.PACKED)
    short = Ring(options, model, 256, weights)
    with short.fight(short.ours(options.memory_budget)) as rounds:
        rounds(short.peer(peer_choice.PACKED[0]), options.rounds)
        rounds(short.peer(peer_choice.PLAIN[0]), options.rounds)
    yield short.case(title)


def bench_prefixes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = models.llama3_folder(options.work, layers=2)
    chats = data.write_prefixed_chats(
        options.work / "prefixed.jsonl", load_tokenizer(model), SYSTEM_TOKENS
    )
    ring = Ring(options, model, 2048, options.base_weights or "nf4", chats)
    with ring.fight(ring.ours(options.memory_budget)) as rounds:
        rounds(ring.peer(peer_choice.PACKED[0]), options.rounds)
    yield ring.case("Llama 3 8B, two layers and head, one system message for all")


def bench_embedded(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    ring = Ring(options, models.embedded_folder(), 1024, options.base_weights or "auto")
    choices = peer_choice.PACKED + peer_choice.GROUPED
    yield from against_tuned(ring, "SmolLM2-135M-Instruct", choices)


def bench_whole8b(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    weights = options.base_weights or "nf4"
    if options.peer:  # it reads bf16
        model = models.llama3_folder(options.work, layers=32)
    else:
        model = models.llama3_store(options.work, weights)
    ring = Ring(options, model, 1024, weights)
    peer = best_whole(options, model, weights) if options.peer else None
    for budget in options.budgets:
        with ring.fight(ring.ours(budget)) as rounds:
            rounds(None, options.rounds)
        if peer is not None:
            ring.compare_apart(peer)
    if options.cgroup:
        limited(ring, options)
    yield ring.case("Llama 3 8B, whole")


def best_whole(options: argparse.Namespace, model: Path, weights: str) -> dict[str, Any]:
    """The figures of the fastest NF4 peer that fits, or, with --settled, of the first setting. It
    runs alone: loading takes it all of this kind of machine."""
    choices = peer_choice.WHOLE[:1] if options.settled else peer_choice.WHOLE
    rings = [(choice, Ring(options, model, length, weights)) for choice, length in choices]
    entries = [ring.peer(choice) for choice, ring in rings]
    best, tried = peer_choice.fastest(entries, rings[-1][1].sgemm, rings[-1][1].logs)
    return next(figures for figures in tried if figures["name"] == best.name)


def limited(ring: Ring, options: argparse.Namespace) -> None:
    """The same budget without and with a hard limit, one after the other: beside each other,
    the limited one would live on pages that the other has cached."""
    with ring.fight(ring.ours(LIMITED_BUDGET)) as rounds:
        rounds(None, options.rounds)
    for folder in (ring.model, cached_store(ring.model, ring.base_weights)):
        drop_cached(folder)
    with memory_limit(options.cgroup) as group:
        with ring.fight(ring.ours(LIMITED_BUDGET, group)) as rounds:
            rounds(None, options.rounds)
        usage = group.usage()
    free, tight = (found["share_of_sgemm"] for found in ring.contenders[-2:])
    peak = usage["peak_bytes"] / report.GIB
    ring.ratios["limited to unlimited"] = f"{tight / free:.0%} of its speed, {peak:.2f} GiB in all"


CASES = {
    "slice": bench_slice,
    "prefixes": bench_prefixes,
    "embedded": bench_embedded,
    "whole8b": bench_whole8b,
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_engine")
    parser.add_argument("case", choices=[*CASES, "all"])
    parser.add_argument("--rounds", type=_count, default=4, help="steps of each contender")
    parser.add_argument("--data", type=Path, help="chats (JSONL) in place of the built-in ones")
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench", help="models and logs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--base-weights", help="ours; default: nf4, and auto for embedded")
    parser.add_argument("--memory-budget", help="ours, for slice and embedded")
    parser.add_argument(
        "--compute-dtype", choices=("fp32", "bf16"), default="fp32", help="of all contenders"
    )
    parser.add_argument(
        "--settled", action="store_true", help="do not tune the peer: take packs, one at a time"
    )
    parser.add_argument(
        "--skip-defaults", action="store_true", help="leave out the peer's defaults, which are slow"
    )
    parser.add_argument("--peer", action="store_true", help="whole8b: against the best NF4 peer")
    parser.add_argument(
        "--budgets", nargs="*", default=BUDGETS, help="whole8b: memory budgets; none: --cgroup only"
    )
    parser.add_argument("--cgroup", type=_size, help="whole8b: a hard limit too, e.g. 4GiB")
    return parser.parse_args(arguments)


def _size(text: str) -> int:
    try:
        return int(str(parse_bytes(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("write a whole number above zero")
    return int(text)


def main() -> int:
    options = parse(sys.argv[1:])
    options.work = options.work.resolve()
    names = list(CASES) if options.case == "all" else [options.case]
    try:
        for name in names:
            cases = []
            for case in CASES[name](options):
                print(report.table(case), end="\n\n", flush=True)
                cases.append(case)
            print(f"wrote {report.write(options.results, name, cases)}")
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
