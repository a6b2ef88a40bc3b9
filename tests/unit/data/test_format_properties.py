"""Row shapes, for any rows: what is said comes through, and nothing fails without a sentence."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaweft.data.example import Example
from llamaweft.data.formats import to_examples, to_prompts
from llamaweft.data.messages import ROLES
from llamaweft.data.shapes import SHAPES, TASK_SHAPES, read_shape
from llamaweft.data.sources import BadRows, Row
from llamaweft.errors import UserError

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)

# --- well-formed chats ----------------------------------------------------------------------------

NAMES = st.text("abc_", min_size=1, max_size=8)
SOUND = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | WORDS
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
CALLS = st.builds(
    lambda name, arguments: {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    NAMES,
    st.dictionaries(WORDS, SOUND, max_size=3),
)
PLAIN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": WORDS}
)
MESSAGES = st.one_of(
    PLAIN,
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": WORDS},
        optional={"tool_calls": st.lists(CALLS, min_size=1, max_size=2), "weight": st.floats(0, 2)},
    ),
    st.fixed_dictionaries(
        {"role": st.just("tool"), "content": WORDS},
        optional={"tool_call_id": WORDS, "name": NAMES},
    ),
)
CHATS = st.lists(MESSAGES, min_size=1, max_size=6)


def read(content: dict[str, Any], task: str = "chat") -> Example:
    (example,) = to_examples([Row("f", "line", 1, content)], task)
    return example


@given(CHATS, st.data())
def test_lists_of_messages_come_through(chat: list[dict], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(chat)))
    column = data.draw(st.sampled_from(["messages", "conversations", "conversation", "turns"]))
    assert list(read({column: chat}).messages) == chat
    if cut < len(chat):
        assert list(read({"prompt": chat[:cut], "completion": chat[cut:]}).messages) == chat


@given(CHATS, st.data())
def test_dialects_say_the_same(chat: list[dict], data: st.DataObject) -> None:
    turns = []
    for message in chat:
        called = [name for name, role in ROLES.items() if role == message["role"]]
        turn = {"from": data.draw(st.sampled_from(called)), "value": message["content"]}
        calls = message.get("tool_calls")
        if turn["from"] == "function_call":
            if not calls or message["content"]:
                turn["from"] = "gpt"
            else:
                turn["value"], calls = json.dumps([call["function"] for call in calls]), None
        rest = {
            name: message[name] for name in ("tool_call_id", "name", "weight") if name in message
        }
        turns.append(turn | rest | ({"tool_calls": calls} if calls else {}))
    assert list(read({"conversations": turns}).messages) == chat


@given(st.lists(WORDS, min_size=2, max_size=7), WORDS.filter(bool))
def test_turns_come_through_every_shape_that_can_say_them(texts: list[str], system: str) -> None:
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    whole = [{"role": "system", "content": system}, *chat]
    assert list(read({"dialog": texts}).messages) == chat
    assert list(read({"dialog": texts, "system": system}).messages) == whole
    if len(chat) % 2 == 0:
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        history = [list(pair) for pair in pairs[:-1]]
        row = {"instruction": texts[-2], "output": texts[-1], "history": history}
        assert list(read(row).messages) == chat
        assert list(read(row | {"system": system}).messages) == whole
    question, answer = texts[:2]
    said = []
    for ask, reply in [("prompt", "completion"), ("question", "answer"), ("query", "response"), ("document", "summary"), ("article", "highlights"), ("instruction", "output")]:  # fmt: skip
        said.append(read({ask: question, reply: answer}))
        assert list(said[-1].messages) == chat[:2]
    assert len({example.key for example in said}) == 1


@given(CHATS)
def test_prompts_leave_only_the_last_answer_out(chat: list[dict]) -> None:
    asked = chat[:-1] if chat[-1]["role"] == "assistant" else chat
    if asked:
        (prompt,) = to_prompts([Row("f", "line", 1, {"messages": chat})])
        assert list(prompt.messages) == asked
    else:
        with pytest.raises(UserError, match="asks nothing"):
            to_prompts([Row("f", "line", 1, {"messages": chat})])


@given(CHATS)
def test_an_example_comes_back_from_its_key(chat: list[dict]) -> None:
    example = read({"messages": chat})
    unweighted = [{k: v for k, v in message.items() if k != "weight"} for message in chat]
    again = Example.from_key("f line 1", example.key)
    assert list(again.messages) == unweighted
    assert again.key == example.key


# --- any rows -------------------------------------------------------------------------------------

COLUMNS = sorted({n for s in SHAPES.values() for n in chain(*s.columns, s.optional)})
FIELDS = ["role", "from", "speaker", "content", "value", "text", "tool_calls", "weight", "name",
          "tool_call_id", "type", "function", "arguments", "answer_start"]  # fmt: skip
NEARLY = st.recursive(
    JSON | st.sampled_from([*ROLES, "function", "{}", '[{"name": "f"}]']),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=12,
)
"""Values that look a little like what shapes hold."""
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from([*ROLES, "robot"]), "content": NEARLY},
        optional={name: NEARLY for name in ("tool_calls", "weight", "name", "tool_call_id")},
    ),
    max_size=3,
)


@given(st.sampled_from(list(SHAPES)), st.data())
def test_a_shape_reads_or_refuses_any_row(shape: str, data: st.DataObject) -> None:
    names = [data.draw(st.sampled_from(column)) for column in SHAPES[shape].columns]
    optional = data.draw(st.lists(st.sampled_from(COLUMNS), max_size=3))
    content = {name: data.draw(NEARLY | TURNS | WORDS) for name in [*names, *optional]}
    try:
        example = read_shape(shape, "f line 1", content)
    except UserError as error:
        sentence = str(error)
    else:
        sentence = example.where
        assert Example.from_key("f line 1", example.key).key == example.key
    assert sentence.startswith("f line 1")


@given(
    st.lists(st.dictionaries(st.sampled_from(COLUMNS) | WORDS, NEARLY, max_size=4), max_size=3),
    st.sampled_from(["auto", *SHAPES]),
    st.sampled_from(list(TASK_SHAPES)),
    st.none() | st.dictionaries(st.sampled_from(COLUMNS) | WORDS, WORDS, max_size=2),
)
def test_any_rows_are_read_counted_or_refused(
    contents: list[dict], shape: str, task: str, columns: dict | None
) -> None:
    rows = [Row("f", "line", number, content) for number, content in enumerate(contents, 1)]
    bad = BadRows("skip")
    try:
        found = list(to_examples(iter(rows), task, shape, columns, bad))
    except UserError:
        pass
    else:
        assert len(found) + bad.count == len(rows)
    bad = BadRows("skip")
    assert len(to_prompts(rows, bad)) + bad.count == len(rows)
