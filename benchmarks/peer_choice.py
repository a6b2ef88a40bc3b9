"""Which settings of the peer are tried, and which of them is its best on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.contender import KEPT_MEMORY, Contender, Entry
from benchmarks.report import figures
from benchmarks.sgemm import Sgemm
from llamaweft.errors import RunError


@dataclass(frozen=True)
class Choice:
    """Settings of the peer beside its model and data; see `benchmarks.peers`.

    kept_memory: run with the allocator's settings that training on a CPU wants. one_by_one: have
    transformers read and quantise one tensor after the other, which takes less memory.
    """

    mode: str
    batch: int
    accumulation: int
    nf4: bool
    checkpointing: bool = False
    kept_memory: bool = True
    one_by_one: bool = False

    @property
    def name(self) -> str:
        step = f"{self.batch}" if self.accumulation == 1 else f"{self.batch}x{self.accumulation}"
        again = " ckpt" if self.checkpointing else ""
        memory = "" if self.kept_memory or self.mode == "defaults" else " plain"
        return f"trl {self.mode} {step} {'nf4' if self.nf4 else 'fp32'}{again}{memory}"

    def entry(self, model: Path, tokens: Path, pack_tokens: int) -> Entry:
        settings: dict[str, Any] = asdict(self)
        del settings["kept_memory"], settings["one_by_one"]
        settings |= {"model": str(model), "tokens": str(tokens), "pack_tokens": pack_tokens}
        environment = dict(KEPT_MEMORY) if self.kept_memory else {}
        if self.one_by_one:
            environment["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        return Entry(f"{self.name} @{pack_tokens}", "benchmarks.peers", settings, environment)


DEFAULTS = Choice("defaults", 8, 1, nf4=True, kept_memory=False)
"""QLoRA's recipes with trl's own batch size."""

PACKED = [Choice("packed", batch, 1, nf4) for nf4 in (True, False) for batch in (1, 2)]
"""Tried on every model."""

PLAIN = [Choice("packed", 1, 1, nf4, kept_memory=False) for nf4 in (True, False)]
"""The same with glibc as it comes: what a person gets who tunes trl but not the allocator."""

GROUPED = [
    Choice("grouped", batch, accumulation, nf4)
    for nf4 in (True, False)
    for batch, accumulation in ((1, 4), (4, 1))
]
"""Tried on the small model as well, where attention over a dense pack costs the most."""

WHOLE = [
    (Choice("packed", 1, 1, True, False, kept_memory=False, one_by_one=True), 256),
    (Choice("packed", 1, 1, True, checkpointing=True, kept_memory=False, one_by_one=True), 1024),
]
"""For the whole 8B, with the tokens of a pack: what fits this kind of machine. It does not load
into 24 GB where glibc keeps memory, nor where transformers reads ahead."""


def fastest(
    entries: Sequence[Entry], sgemm: Sgemm, logs: Path
) -> tuple[Entry, list[dict[str, Any]]]:
    """The entry with the most real tokens a second, held against what the machine multiplied
    meanwhile, after a warm-up and one step; and the figures of all. One that fails is noted.

    Raises RunError when all fail.
    """
    tried: list[dict[str, Any]] = []
    best: tuple[float, Entry] | None = None
    for entry in entries:
        try:
            with Contender(entry, logs) as contender:
                rates = [sgemm.measure()]
                contender.step()
                rates.append(sgemm.measure())
                found = figures(contender)
        except RunError as error:
            tried.append({"name": entry.name, "failed": str(error)})
            continue
        rate = found["real_tokens_per_second"] / (sum(rates) / 2)
        tried.append(found | {"real_tokens_per_tflop_of_sgemm": rate * 1e12})
        if best is None or rate > best[0]:
            best = (rate, entry)
    if best is None:
        raise RunError(f"no setting of the peer ran: {tried[0]['failed']}")
    return best[1], tried
