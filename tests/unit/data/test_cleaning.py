"""Cleaning: each step removes what it is for, counts it, and leaves the rest as it is."""

from __future__ import annotations

import sys
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaweft.data import cleaning
from llamaweft.data.cleaning import (
    ROW_STEPS,
    Cleaner,
    Empty,
    Language,
    Length,
    Normalize,
    Regex,
    texts_of,
)
from llamaweft.data.example import Example
from llamaweft.errors import UserError


def chat(*turns: tuple[str, str], where: str = "f line 1") -> Example:
    return Example(where, tuple({"role": role, "content": content} for role, content in turns))


def text(content: str, where: str = "f line 1") -> Example:
    return Example(where, text=content)


GERMAN = "Der Antrag auf eine Genehmigung muss vor dem Beginn der Arbeiten gestellt werden."
SPANISH = "La solicitud de permiso debe presentarse antes de que comiencen los trabajos."
ENGLISH = "The application for a permit must be filed before the work begins."

CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "lamp", "arguments": {"room": "café"}}}
    ],
}


def test_every_step_of_the_recipe_that_looks_at_one_row_is_known_by_its_name() -> None:
    assert set(ROW_STEPS) == {"normalize", "empty", "length", "regex", "language"}
    assert ROW_STEPS["length"](min_characters=1, max_characters=2).name == "length"


def test_what_a_chat_says_holds_its_function_calls_and_can_be_narrowed_to_roles() -> None:
    example = Example("f", ({"role": "user", "content": "Lamp on"}, CALL))
    assert texts_of(example)[0] == "Lamp on"
    assert '"room": "café"' in texts_of(example)[1]
    assert texts_of(example, ["user"]) == ["Lamp on"]


def test_normalize_changes_contents_and_calls_and_counts_only_what_changed() -> None:
    apart = unicodedata.normalize("NFD", "café")
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"arguments": apart}}],
    }
    cleaner = Cleaner([Normalize()])
    assert cleaner(text(apart)) == text("café")
    assert cleaner(chat(("user", apart), ("assistant", "a"))) == chat(
        ("user", "café"), ("assistant", "a")
    )
    called = cleaner(Example("f", (call,)))
    assert called.messages[0]["tool_calls"][0]["function"]["arguments"] == "café"
    same = text("café")
    assert cleaner(same) is same
    assert (cleaner.removed[0].count, cleaner.removed[0].changed) == (0, 3)


def test_normalize_nfkc_writes_ligatures_out_and_nfc_does_not() -> None:
    assert Normalize("NFKC")(text("ﬁne")).text == "fine"
    assert Normalize("NFC")(text("ﬁne")).text == "ﬁne"


@given(st.text(), st.sampled_from(["NFC", "NFKC"]))
def test_normalizing_twice_changes_nothing_more(content: str, form: str) -> None:
    once = Normalize(form)(text(content))
    assert Normalize(form)(once) is once


@pytest.mark.parametrize(
    ("row", "stays"),
    [
        (text("  \n\t"), False),
        (text("ab"), False),
        (text(" abc "), True),
        (chat(("user", "a question"), ("assistant", " ")), False),
        (
            chat(("user", "a question"), ("assistant", ""), ("user", "q"), ("assistant", "yes")),
            True,
        ),
        (chat(("user", "only a question")), False),
        (Example("f", ({"role": "user", "content": "Lamp on"}, CALL)), True),
    ],
)
def test_empty_removes_rows_that_answer_nothing(row: Example, stays: bool) -> None:
    assert (Empty(min_characters=3)(row) is row) == stays


@pytest.mark.parametrize(
    ("bounds", "stays"),
    [
        ({"min_characters": 5}, True),
        ({"min_characters": 6}, False),
        ({"max_characters": 5}, True),
        ({"max_characters": 4}, False),
        ({"min_characters": 5, "max_characters": 5}, True),
    ],
)
def test_length_counts_the_characters_of_the_whole_row(bounds: dict[str, int], stays: bool) -> None:
    row = chat(("user", "abc"), ("assistant", "de"))
    assert (Length(**bounds)(row) is row) == stays


def test_regex_drops_what_is_found_and_keeps_only_what_is_found() -> None:
    row = chat(("system", "be kind"), ("user", "order 66"), ("assistant", "no"))
    assert Regex(drop=r"\d{2}")(row) is None
    assert Regex(drop=r"\d{3}")(row) is row
    assert Regex(keep=r"^no$")(row) is row
    assert Regex(keep=r"^yes$")(row) is None
    assert Regex(keep="kind", drop="66")(row) is None


def test_an_invalid_pattern_is_named() -> None:
    with pytest.raises(UserError, match=r"pattern '\(a' of the step regex is not a valid"):
        Regex(drop="(a")


def test_a_catastrophic_pattern_stops_with_the_row_and_the_pattern(monkeypatch) -> None:
    monkeypatch.setattr(cleaning, "REGEX_SECONDS", 0.1)
    row = text("a" * 40 + "!", where="chats.jsonl line 7")
    before = time.monotonic()
    with pytest.raises(UserError, match=r"chats.jsonl line 7: the pattern '\(a\|aa\)\+\$'"):
        Regex(drop="(a|aa)+$")(row)
    assert time.monotonic() - before < 10


@pytest.mark.parametrize(
    ("content", "stays"), [(GERMAN, False), (SPANISH, True), (ENGLISH, True), ("42 + 7 = 49", True)]
)
def test_language_keeps_the_languages_named_and_rows_without_letters(
    content: str, stays: bool
) -> None:
    row = chat(("user", content), ("assistant", content))
    assert (Language(["en", "es"])(row) is row) == stays


def test_a_foreign_system_prompt_does_not_decide_the_language() -> None:
    row = chat(("system", f"{ENGLISH} " * 20), ("user", GERMAN), ("assistant", GERMAN))
    assert Language(["de"])(row) is row


@pytest.mark.parametrize("code", ["xx", "german", "pcm"])
def test_a_language_that_cannot_be_told_is_named(code: str) -> None:
    with pytest.raises(UserError, match=f"cannot tell '{code}'; it knows .* de .* en "):
        Language(["en", code])


def test_without_its_library_language_says_what_to_install(monkeypatch) -> None:
    cleaning._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(UserError, match=r"pip install 'llamaweft\[clean\]'"):
        Language(["en"])


def test_steps_go_in_order_and_each_counts_what_it_did() -> None:
    cleaner = Cleaner([Normalize("NFKC"), Length(max_characters=20), Empty(), Regex(drop="bad")])
    rows = [
        text(c, f"f line {i}") for i, c in enumerate(["ﬁne", "bad", " ", "x" * 21, "ﬁne bad"], 1)
    ]
    assert [row.text for row in map(cleaner, rows) if row is not None] == ["fine"]
    done = {r.step: (r.count, r.changed) for r in cleaner.removed}
    assert done == {"normalize": (0, 2), "length": (1, 0), "empty": (1, 0), "regex": (2, 0)}
    assert cleaner.removed[3].examples == ["f line 2: bad", "f line 5: fine bad"]


def test_only_the_first_five_are_shown_with_a_short_excerpt() -> None:
    cleaner = Cleaner([Length(max_characters=10)])
    for number in range(1, 9):
        cleaner(text("long words\n\n" * 1000, f"f line {number}"))
    removed = cleaner.removed[0]
    assert (removed.count, len(removed.examples)) == (8, 5)
    assert removed.examples[0].startswith("f line 1: long words long words")
    assert all(len(shown) < 100 and "\n" not in shown for shown in removed.examples)


@given(st.lists(st.text(max_size=30)))
def test_every_row_either_stays_or_is_counted(contents: list[str]) -> None:
    cleaner = Cleaner([Normalize(), Empty(2), Length(max_characters=20), Regex(drop="a")])
    left = [row for row in map(cleaner, map(text, contents)) if row is not None]
    assert len(left) + sum(removed.count for removed in cleaner.removed) == len(contents)
