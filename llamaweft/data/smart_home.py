"""The embedded data set of the demo: a spoken smart-home request, answered by the JSON intent
that Home Assistant executes.

    "turn off the kitchen lights"
    {"intent": "HassTurnOff", "slots": {"area": "kitchen", "domain": "light"}}

The sentences are drawn from the English grammars of the package home-assistant-intents
(Apache-2.0, https://github.com/OHF-Voice/intents). Each answer is checked with hassil
(Apache-2.0), Home Assistant's own recogniser: a sentence that it reads otherwise is not kept.
A place that the sentence does not name is not in the answer: Home Assistant adds it.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llamaweft.data.smart_home_grammar import Grammar, Sample, Template, package_version
from llamaweft.errors import UserError
from llamaweft.runtime import cache_dir

SPLITS = ("train", "validation", "random")
SYSTEM = "Answer in JSON."


@dataclass(frozen=True)
class Plan:
    """How many rows to draw for each intent, at most; from which templates; with which seed."""

    train: int = 72
    validation: int = 8
    random: int = 5
    per_template: int = 22
    """Rows of one template in one split, at most."""
    held_out_share: float = 0.2
    """The share of an intent's templates that only validation uses."""
    least_templates: int = 4
    """An intent with fewer templates holds none out."""
    draws: int = 40
    """Draws from a template before it is given up for one sentence."""
    seed: int = 2026


def rows(split: str) -> list[dict]:
    """The rows of a split, each `{"messages": [system, user, assistant]}`.

    train: what to learn from. validation: sentences of templates that train has none of, so what
    is measured is understanding. random: new sentences of train's templates, what a random split
    would measure. No sentence is in two splits. The rows are the same on every machine.

    Raises UserError: an unknown split, or home-assistant-intents or hassil is not installed.
    """
    with path(split).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def path(split: str) -> Path:
    """The JSONL file of a split, in the cache; all splits are built if it is not there (seconds).

    Raises UserError: an unknown split, or home-assistant-intents or hassil is not installed.
    """
    if split not in SPLITS:
        raise UserError(
            f"The smart-home data set has no split {split!r}: choose one of {', '.join(SPLITS)}."
        )
    folder = cache_dir() / "smart-home" / f"{package_version()}-{_fingerprint()}"
    if not folder.is_dir():
        _write(folder, Plan())
    return folder / f"{split}.jsonl"


def _fingerprint() -> str:
    """Changes when the code or the lists that make the rows change."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("smart_home*.py")):
        digest.update(source.read_text(encoding="utf-8").encode())
    return digest.hexdigest()[:12]


def _write(folder: Path, plan: Plan) -> None:
    """Build into a folder aside, then rename it: `folder` is complete or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        for split, samples in _build(plan).items():
            lines = [json.dumps(_row(sample), ensure_ascii=False) + "\n" for sample in samples]
            (aside / f"{split}.jsonl").write_bytes("".join(lines).encode())
        try:
            aside.rename(folder)
        except OSError:
            # Another process was first; its rows are the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _row(sample: Sample) -> dict:
    answer = json.dumps({"intent": sample.intent, "slots": sample.slots}, ensure_ascii=False)
    contents = (("system", SYSTEM), ("user", sample.sentence), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in contents]}


def _build(plan: Plan) -> dict[str, list[Sample]]:
    """Draw all splits. `Sample.parents` tells which templates stand behind a sentence."""
    grammar = Grammar()
    hat = _Hat(grammar, plan)
    splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for templates in grammar.templates().values():
        held_out = _hold_out(templates, plan)
        kept = {template.key for template in templates} - held_out
        trained = hat.draw("train", _only(templates, kept), held_out, plan.train)
        used = {sample.parents[0] for sample in trained}
        wanted = min(plan.random, len(trained) // 8)
        splits["train"] += trained
        splits["random"] += hat.draw("random", _only(templates, used), held_out, wanted)
        splits["validation"] += hat.draw(
            "validation", _only(templates, held_out), kept, plan.validation
        )
    for split, samples in splits.items():
        random.Random(f"{plan.seed}/{split}").shuffle(samples)
    return splits


def _only(templates: list[Template], keys: set[tuple[str, str]]) -> list[Template]:
    return [template for template in templates if template.key in keys]


def _hold_out(templates: list[Template], plan: Plan) -> set[tuple[str, str]]:
    """The keys of the templates of an intent that only validation uses."""
    if len(templates) < plan.least_templates:
        return set()
    count = max(1, round(plan.held_out_share * len(templates)))
    rng = random.Random(f"{plan.seed}/{templates[0].intent}/held out")
    return {template.key for template in rng.sample(templates, count)}


class _Hat:
    """Sentences are drawn from it, each only once."""

    def __init__(self, grammar: Grammar, plan: Plan) -> None:
        self.grammar, self.plan = grammar, plan
        self.seen: set[str] = set()

    def draw(
        self, split: str, templates: list[Template], barred: set[tuple[str, str]], wanted: int
    ) -> list[Sample]:
        """Up to `wanted` new sentences, the templates taking turns. A sentence that a template
        of the `barred` ones gives too is not used."""
        drawn: list[Sample] = []
        turns = [(t, random.Random(f"{self.plan.seed}/{split}/{t.key}")) for t in templates]
        random.Random(f"{self.plan.seed}/{split}/turns").shuffle(turns)
        for _ in range(self.plan.per_template):
            fruitful = []
            for template, rng in turns:
                if len(drawn) == wanted:
                    return drawn
                sample = self._draw_one(template, rng, barred)
                if sample is not None:
                    fruitful.append((template, rng))
                    drawn.append(sample)
            turns = fruitful
        return drawn

    def _draw_one(
        self, template: Template, rng: random.Random, barred: set[tuple[str, str]]
    ) -> Sample | None:
        for _ in range(self.plan.draws):
            sample = self.grammar.sample(template, rng)
            if sample is None or not barred.isdisjoint(sample.parents):
                continue
            text = sample.sentence.casefold()
            if text not in self.seen:
                self.seen.add(text)
                return sample
        return None
