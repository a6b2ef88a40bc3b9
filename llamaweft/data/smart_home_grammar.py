"""The grammar behind the smart-home data set: sentences at random, and hassil's reading of them.

The sentence templates are those of the package home-assistant-intents (Apache-2.0,
https://github.com/OHF-Voice/intents); the recogniser is hassil (Apache-2.0), the one that
Home Assistant uses.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

from llamaweft.data.smart_home_lists import (
    CLASS_OF,
    DEVICES,
    FLOOR_OF,
    NUMBERS,
    PERCENTAGES,
    UNSPOKEN,
    WILDCARDS,
)
from llamaweft.errors import UserError

# The area of the device that listens. Home Assistant adds it to requests that name no place;
# it is not in the sentence, so it is not in the answer either.
HERE = "here"


@dataclass(frozen=True)
class Template:
    """One sentence template: a string of one intent's `sentences` lists. The string may stand
    in several blocks of the intent (covers, valves); each has its own fixed slots and domains."""

    intent: str
    text: str
    blocks: tuple[Any, ...]

    @property
    def key(self) -> tuple[str, str]:
        return self.intent, self.text


@dataclass(frozen=True)
class Sample:
    """A sentence with its one reading. `parents` are the keys of all templates that give the
    sentence this reading, the sampled one first."""

    sentence: str
    intent: str
    slots: dict[str, Any]
    parents: tuple[tuple[str, str], ...]


def package_version() -> str:
    """The versions of the grammars and the recogniser, as `grammars-recogniser`.

    Raises UserError when one of the two packages is not installed.
    """
    found = []
    for package in ("home-assistant-intents", "hassil"):
        try:
            found.append(metadata.version(package))
        except metadata.PackageNotFoundError:
            raise UserError(
                f"The smart-home data set needs the package {package}, which is not installed in "
                "this Python: run pip install 'llamaweft[demo]'."
            ) from None
    return "-".join(found)


class Grammar:
    """The English grammars of Home Assistant, with the names and places of our home."""

    def __init__(self) -> None:
        from hassil.intents import Intents, TextSlotList

        source = resources.files("home_assistant_intents") / "data" / "en.json"
        self.intents = Intents.from_dict(json.loads(source.read_text(encoding="utf-8")))
        self.intents.slot_lists |= {
            "name": TextSlotList.from_tuples(
                (name, name, {"domain": domain})
                for domain, names in DEVICES.items()
                for name in names
            ),
            "area": TextSlotList.from_strings(FLOOR_OF),
            "floor": TextSlotList.from_strings(dict.fromkeys(FLOOR_OF.values())),
        }
        self.area_of = {name: area for names in DEVICES.values() for name, area in names.items()}

    def templates(self) -> dict[str, list[Template]]:
        """All templates by intent, both in alphabetical order."""
        found: dict[str, list[Template]] = {}
        for intent in sorted(self.intents.intents):
            blocks: dict[str, list[Any]] = {}
            for block in self.intents.intents[intent].data:
                for sentence in block.sentences:
                    of_text = blocks.setdefault(str(sentence.text), [])
                    of_text.append((block, sentence.expression))
            found[intent] = [Template(intent, text, tuple(blocks[text])) for text in sorted(blocks)]
        return found

    def sample(self, template: Template, rng: random.Random) -> Sample | None:
        """A random sentence of the template, or None when this draw is not one that people
        say, does not fit the home, or is not recognised as the template means it."""
        block, expression = rng.choice(template.blocks)
        meant = dict(block.slots)
        sentence = " ".join(self._walk(expression, block, rng, meant).split())
        if UNSPOKEN.search(sentence) or not self._fits(meant):
            return None
        parents = self._readings(sentence, template.intent, meant)
        if template.key not in parents:
            return None
        slots = {name: _natural(meant[name]) for name in sorted(meant)}
        others = sorted(set(parents) - {template.key})
        return Sample(sentence, template.intent, slots, (template.key, *others))

    def recognise(self, sentence: str) -> tuple[str, dict[str, Any]] | None:
        """The reading that Home Assistant takes: (intent, slots), or None."""
        from hassil import recognize_best

        best = recognize_best(
            sentence, self.intents, intent_context={"area": HERE}, best_slot_name="name"
        )
        return None if best is None else _reading(best)

    def _readings(self, sentence: str, intent: str, meant: dict[str, Any]) -> list[tuple[str, str]]:
        """The templates that read the sentence as it is meant; none if another reading wins."""
        from hassil import recognize_all

        results = list(recognize_all(sentence, self.intents, intent_context={"area": HERE}))
        agree = [r for r in results if _reading(r) == (intent, meant)]
        if len(agree) < len(results) and self.recognise(sentence) != (intent, meant):
            return []
        return [(intent, str(r.intent_sentence.text)) for r in agree if r.intent_sentence]

    def _fits(self, slots: dict[str, Any]) -> bool:
        """Whether the named device stands in the named place, and the title is of its kind."""
        kind = CLASS_OF.get(slots.get("search_query", ""))
        if kind is not None and slots.get("media_class", kind) != kind:
            return False
        home = self.area_of.get(slots.get("name", ""))
        if home is None:
            return True
        return slots.get("area", home) == home and (
            "floor" not in slots or FLOOR_OF.get(home) == slots["floor"]
        )

    def _walk(self, node: Any, block: Any, rng: random.Random, slots: dict[str, Any]) -> str:
        """Expand an expression at random; the values of its lists go into `slots`."""
        from hassil.expression import (
            Alternative,
            ListReference,
            Permutation,
            RuleReference,
            TextChunk,
        )

        if isinstance(node, TextChunk):
            return node.original_text
        if isinstance(node, RuleReference):
            rules = {**self.intents.expansion_rules, **block.expansion_rules}
            return self._walk(rules[node.rule_name].expression, block, rng, slots)
        if isinstance(node, ListReference):
            return self._pick(node, block, rng, slots)
        if isinstance(node, Alternative):
            return self._walk(rng.choice(node.items), block, rng, slots)
        if isinstance(node, Permutation):
            items = rng.sample(node.items, len(node.items))
            return " ".join(self._walk(item, block, rng, slots) for item in items)
        return "".join(self._walk(item, block, rng, slots) for item in node.items)

    def _pick(self, node: Any, block: Any, rng: random.Random, slots: dict[str, Any]) -> str:
        """Choose a value of a list, put it into `slots`, return how it is said."""
        from hassil.intents import RangeSlotList, TextSlotList

        name = node.list_name
        values = {**self.intents.slot_lists, **block.slot_lists}[name]
        if isinstance(values, TextSlotList):
            domains = block.requires_context.get("domain")
            value = rng.choice(
                [
                    v
                    for v in values.values
                    if not domains or not v.context or v.context["domain"] in domains
                ]
            )
            text = self._walk(value.text_in, block, rng, slots)
            slots[node.slot_name] = text if value.value_out is None else value.value_out
        elif isinstance(values, RangeSlotList):
            number = rng.choice(NUMBERS.get(name, PERCENTAGES))
            text = str(number)
            slots[node.slot_name] = number * (values.multiplier or 1)
        elif name in WILDCARDS:
            text = slots[node.slot_name] = rng.choice(WILDCARDS[name])
        else:
            raise UserError(
                f"The installed home-assistant-intents has a list {{{name}}} that llamaweft does "
                "not know: run pip install 'llamaweft[demo]' to get the version that it knows."
            )
        return text


def _reading(result: Any) -> tuple[str, dict[str, Any]]:
    slots = {e.name: e.value for e in result.entities_list if e.value != HERE}
    return result.intent.name, slots


def _natural(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
