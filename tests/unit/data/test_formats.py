"""Row shapes: recognised, named, mapped, refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamaweft.data import formats
from llamaweft.data.example import Example, Labels, Preference, Rating, Span, Tags
from llamaweft.data.formats import to_examples, to_prompts
from llamaweft.data.shapes import SHAPES, TASK_SHAPES, read_shape
from llamaweft.data.sources import BadRows, Row
from llamaweft.errors import UserError


def rows(*contents: dict, name: str = "f") -> list[Row]:
    return [Row(name, "line", number, content) for number, content in enumerate(contents, 1)]


def read(*contents: dict, task: str = "chat", **options) -> list[Example]:
    return list(to_examples(rows(*contents), task, **options))


def said(example: Example) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in example.messages]


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def refused(*contents: dict, words: list[str], **options) -> None:
    with pytest.raises(UserError) as caught:
        read(*contents, **options)
    for word in words:
        assert word in str(caught.value)


CHAT = [("user", "q"), ("assistant", "a")]
MESSAGES = [user("q"), assistant("a")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds"}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": MESSAGES}, CHAT),
        ({"messages": [{"role": "developer", "content": "s"}, *MESSAGES]}, [("system", "s"), *CHAT]),
        ({"messages": MESSAGES, "system": "s"}, [("system", "s"), *CHAT]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, CHAT),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "bard", "value": "a"}]}, CHAT),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "chatgpt", "value": "a"}]}, CHAT),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "bing", "value": "a"}]}, CHAT),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]}, [("system", "s"), ("user", "q")]),
        ({"conversations": MESSAGES, "system": "s"}, [("system", "s"), *CHAT]),
        ({"conversation": MESSAGES}, CHAT),
        ({"prompt": "q", "completion": "a"}, CHAT),
        ({"prompt": "q", "completion": "a", "system": "s"}, [("system", "s"), *CHAT]),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, CHAT),
        ({"prompt": [user("q"), assistant("a"), user("r")], "completion": "b"}, [*CHAT, ("user", "r"), ("assistant", "b")]),
        ({"instruction": "q", "output": "a"}, CHAT),
        ({"instruction": "q", "input": "", "output": "a"}, CHAT),
        ({"instruction": "q", "input": None, "output": "a", "history": []}, CHAT),
        ({"instruction": "q", "input": "i", "output": "a"}, [("user", "q\n\ni"), ("assistant", "a")]),
        ({"instruction": "q", "output": "a", "system": "s", "history": [["u", "v"]]}, [("system", "s"), ("user", "u"), ("assistant", "v"), *CHAT]),
        ({"question": "q", "answer": "a"}, CHAT),
        ({"query": "q", "response": "a"}, CHAT),
        ({"question": None, "query": "q", "answer": "a"}, CHAT),
        ({"question": "q", "context": "c", "answer": "a"}, [("user", "c\n\nq"), ("assistant", "a")]),
        ({"question": "q", "context": "ba", "answers": {"text": ["a", "ba"], "answer_start": [1, 0]}}, [("user", "ba\n\nq"), ("assistant", "a")]),
        ({"document": "q", "summary": "a"}, CHAT),
        ({"article": "q", "highlights": "a"}, CHAT),
        ({"dialog": ["q", "a", "r"]}, [*CHAT, ("user", "r")]),
        ({"dialogue": ["q", "a"]}, CHAT),
        ({"turns": [{"speaker": "user", "text": "q"}, {"speaker": "assistant", "text": "a"}]}, CHAT),
        # The columns of two shapes, or columns without a value.
        ({"messages": MESSAGES, "text": "t"}, CHAT),
        ({"messages": MESSAGES, "prompt": "p", "chosen": "c", "rejected": "r"}, CHAT),
        ({"messages": None, "prompt": "q", "completion": "a", "label": None}, CHAT),
    ],
)  # fmt: skip
def test_chats_are_recognised(row: dict, expected: list) -> None:
    (example,) = read(row)
    assert said(example) == expected
    assert example.target is None
    assert example.where == "f line 1"


def test_text_is_for_the_text_task() -> None:
    assert read({"text": "t"}, task="text")[0].text == "t"
    refused({"text": "t"}, words=["f line 1", "shape text", "does not fit task: chat", "alpaca"])
    refused({"prompt": "q", "completion": "a"}, task="text", words=["does not fit task: text"])


# --- messages and tools ---------------------------------------------------------------------------


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": "b"}]
    assert said(read({"messages": [user("q"), {"role": "assistant", "content": parts}]})[0])[1] == ("assistant", "ab")  # fmt: skip


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_tools_and_their_calls_take_one_form(arguments: object) -> None:
    function = {"name": "add", "arguments": arguments}
    messages = [
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "two", "tool_calls": [], "weight": 0},
    ]
    (example,) = read({"messages": messages, "tools": [TOOL]})
    assert example.messages == (
        user("q"),
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "two", "weight": 0.0},
    )
    assert example.tools == (TOOL,)


@pytest.mark.parametrize(
    "tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], [TOOL["function"] | {"type": None}]]
)
def test_tools_are_read_from_lists_and_json(tools: object) -> None:
    for row in (
        {"messages": MESSAGES},
        {"conversations": MESSAGES},
        {"prompt": "q", "completion": "a"},
    ):
        assert read(row | {"tools": tools})[0].tools == (TOOL,)
    assert read({"messages": MESSAGES, "tools": ""})[0].tools == ()


@pytest.mark.parametrize("role", ["tool", "observation", "function_response"])
@pytest.mark.parametrize("many", [False, True])
def test_calls_in_sharegpt(role: str, many: bool) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps([call, call] if many else call)},
        {"from": role, "value": "2"},
    ]
    expected = [CALL, CALL] if many else [CALL]
    assert read({"conversations": turns})[0].messages == (
        user("q"),
        {"role": "assistant", "content": "", "tool_calls": expected},
        {"role": "tool", "content": "2"},
    )


NESTED = {"a": json.loads("[" * 100 + "]" * 100)}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", ["must be a list", "'hello'"]),
        ([], ["at least one"]),
        (["hello"], ["message 1", "an object with role and content"]),
        ([user("q"), {"content": "a"}], ["message 2 has no role"]),
        ([user("q"), {"from": "robot", "value": "a"}], ["message 2", "'from' is 'robot'", "known are system"]),
        ([{"role": ["user"], "content": "a"}], ["message 1", "'role' is a list"]),
        ([{"role": "user"}], ["message 1", "'content'", "missing"]),
        ([{"role": "user", "content": 3}], ["'content' must be text", "is 3"]),
        ([{"role": "user", "content": None}], ["'content' must be text"]),
        ([{"role": "user", "content": "q", "tone": "rude"}], ["'tone' is not supported"]),
        ([{"role": "user", "content": "q", "tool_calls": [CALL]}], ["'tool_calls'", "assistant"]),
        ([assistant("a") | {"tool_calls": "x"}], ["'tool_calls' must be a list"]),
        ([assistant("a") | {"tool_calls": [1]}], ["message 1, call 1", "name and arguments"]),
        ([assistant("a") | {"tool_calls": [{"type": "code", **CALL["function"]}]}], ["call 1"]),
        ([assistant("a") | {"tool_calls": [CALL | {"index": 0}]}], ["call 1", "'index' is not supported"]),
        ([assistant("a") | {"tool_calls": [{"name": "f", "arguments": "{oops"}]}], ["call 1", "'arguments' is not valid JSON", "{oops"]),
        ([assistant("a") | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}], ["call 1", "'arguments' must be an object"]),
        ([assistant("a") | {"tool_calls": [{"name": "f", "arguments": '{"a": 1e999}'}]}], ["call 1", "JSON cannot say"]),
        ([assistant("a") | {"tool_calls": [{"name": "f", "arguments": '{"a": "\\ud800"}'}]}], ["call 1", "half a character"]),
        ([assistant("a") | {"tool_calls": [{"name": "f", "arguments": NESTED}]}], ["call 1", "nests deeper than 64"]),
        ([assistant("a") | {"tool_calls": [{"name": "f", "arguments": "[" * 100_000}]}], ["call 1", "not valid JSON"]),
        ([{"from": "function_call", "value": "{}"}], ["'value' of a function_call"]),
        ([{"from": "function_call", "value": '"add"'}], ["message 1", "must be a list"]),
        ([assistant("a") | {"weight": -1}], ["'weight'", "from 0 to 1,000,000"]),
        ([assistant("a") | {"weight": True}], ["'weight'"]),
        ([assistant("a") | {"weight": float("nan")}], ["'weight'", "nan"]),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], ["part 1", "'image_url'", "only text", "take images"]),
        ([{"role": "user", "content": ["hello"]}], ["part 1", "type and text"]),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}], ["'cache'", "part 1"]),
    ],
)  # fmt: skip
def test_bad_messages_are_named(messages: object, words: list[str]) -> None:
    refused({"messages": messages}, words=["f line 1", *words])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "system", "content": "s"}], "system": "s"}, ["keep one"]),
        ({"messages": MESSAGES, "tools": "{oops"}, ["'tools' is not valid JSON"]),
        ({"messages": MESSAGES, "tools": "3"}, ["'tools' must be a list"]),
        ({"messages": MESSAGES, "tools": [TOOL, {"type": "function"}]}, ["tool 2", "function"]),
        ({"messages": MESSAGES, "tools": [{"type": "search", "name": "x"}]}, ["tool 1"]),
        ({"messages": MESSAGES, "tools": [{"name": "f", "parameters": NESTED}]}, ["tool 1", "nests"]),
        ({"conversations": [{"from": "robot", "value": "a"}]}, ["message 1 of conversations", "'robot'"]),
        ({"prompt": "q", "completion": [user("a"), {}]}, ["message 2 of completion has no role"]),
        ({"prompt": 3, "completion": "a"}, ["'prompt' must be text", "3"]),
        ({"prompt": "q", "completion": None}, ["'completion' must be text", "missing"]),
        ({"instruction": "q", "output": "a", "history": "h"}, ["'history' must be a list"]),
        ({"instruction": "q", "output": "a", "history": [["a", "b"], ["a"]]}, ["pair 2 of 'history'"]),
        ({"query": 1, "response": "a"}, ["'query' must be text"]),
        ({"question": "q", "context": "c", "answers": ["a"]}, ["'answers' must be an object"]),
        ({"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": []}}, ["'answers'", "same length"]),
        ({"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [-1]}}, ["'c' is not at character -1"]),
        ({"question": "q", "context": "abc", "answers": {"text": ["c"], "answer_start": [1]}}, ["'c' is not at character 1", "answer_start"]),
        ({"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}, ["no answer"]),
        ({"dialog": ["a", 3]}, ["message 1 of dialog"]),
        ({"dialog": "a"}, ["'dialog' must be a list"]),
        ({"foo": 1, "bar": 2}, ["no known shape", "it has foo, bar", "conversations/conversation", "map names with columns"]),
        ({}, ["no columns"]),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(row: dict, words: list[str]) -> None:
    refused(row, words=["f line 1", *words])


def test_a_sentence_does_not_repeat_a_whole_row() -> None:
    with pytest.raises(UserError) as caught:
        read({"messages": "x" * 100_000})
    assert len(str(caught.value)) < 300
    with pytest.raises(UserError) as caught:
        read({"x" * 100_000: 1})
    assert len(str(caught.value)) < 1500


# --- columns and several shapes ------------------------------------------------------------------


def test_columns_are_mapped() -> None:
    mapped = read({"q": "q", "a": "a"}, columns={"prompt": "q", "completion": "a"})
    assert said(mapped[0]) == CHAT
    swapped = read({"question": "a", "answer": "q"}, columns={"question": "answer", "answer": "question"})  # fmt: skip
    assert said(swapped[0]) == CHAT
    taken = read({"messages": "t"}, task="text", columns={"text": "messages"})
    assert taken[0].text == "t"
    refused(
        {"q": "q", "a": "a"}, columns={"prompt": "x"}, words=["line 1 has no column 'x'", "q, a"]
    )


def test_a_map_of_unknown_columns_is_refused() -> None:
    refused({"q": "q"}, columns={"promt": "q"}, words=["'promt'", "any shape", "'prompt'"])
    refused(
        {"q": "q"},
        shape="alpaca",
        columns={"outptu": "q"},
        words=["'outptu'", "alpaca", "'output'"],
    )


def test_a_shape_can_be_named() -> None:
    row = {"prompt": "q", "completion": "a", "label": "billing"}
    refused(row, words=["shape rating", "with format: prompt_completion"])
    assert said(read(row, shape="prompt_completion")[0]) == CHAT
    refused({"question": "q"}, shape="alpaca", words=["f line 1 has not", "instruction + output"])
    refused(row, shape="alpacca", words=["'alpacca' is no shape", "alpaca"])
    with pytest.raises(UserError, match="'alpacca' is no shape"):
        read_shape("alpacca", "f line 1", row)


def test_several_shapes_are_named_with_the_first_row_of_each() -> None:
    chat, pair, text = {"messages": MESSAGES}, {"prompt": "q", "completion": "a"}, {"text": "t"}
    with pytest.raises(UserError) as caught:
        read(chat, chat, pair, pair, {"foo": 1}, chat, text, text)
    sentence = str(caught.value)
    assert "f line 1 of the shape messages, f line 3 of the shape prompt_completion, f line 7 of the shape text;" in sentence  # fmt: skip
    assert "line 4" not in sentence


def test_looking_for_further_shapes_ends() -> None:
    looked: list[int] = []

    def source() -> Iterator[Row]:
        for number in range(1, 2 * formats.LOOK_AHEAD_ROWS):
            looked.append(number)
            content = {"messages": MESSAGES} if number == 1 else {"prompt": "q", "completion": "a"}
            yield Row("f", "line", number, content)

    with pytest.raises(UserError, match="several shapes"):
        list(to_examples(source(), "chat"))
    assert len(looked) == 2 + formats.LOOK_AHEAD_ROWS


def test_each_file_of_a_source_has_a_shape_of_its_own() -> None:
    source = rows({"messages": MESSAGES}, name="a") + rows({"prompt": "q", "completion": "a"}, name="b")  # fmt: skip
    assert [said(example) for example in to_examples(source, "chat")] == [CHAT, CHAT]
    source += rows({"text": "t"}, name="c")
    with pytest.raises(UserError, match="c line 1 is of the shape text, which does not fit"):
        list(to_examples(source, "chat"))


def test_only_the_file_with_several_shapes_is_named() -> None:
    chat, pair = {"messages": MESSAGES}, {"prompt": "q", "completion": "a"}
    source = rows(chat, pair, name="a") + rows({"dialog": ["q", "a"]}, name="b")
    with pytest.raises(UserError, match=r"a line 2 of the shape prompt_completion; ") as caught:
        list(to_examples(source, "chat"))
    assert "dialogue" not in str(caught.value)


def test_rows_stream() -> None:
    def source() -> Iterator[Row]:
        yield from rows({"messages": MESSAGES})
        raise AssertionError("read too far")

    assert said(next(to_examples(source(), "chat"))) == CHAT


def test_bad_rows_are_skipped_and_counted() -> None:
    bad = BadRows("skip")
    contents = [{"foo": 1}, {"messages": MESSAGES}, {"messages": []}, {"messages": MESSAGES}]
    found = read(*contents, bad=bad)
    assert [example.where for example in found] == ["f line 2", "f line 4"]
    assert bad.count == 2
    assert "f line 1 is of no known shape" in bad.examples[0]
    assert "f line 3" in bad.examples[1]
    refused(*contents, {"text": "t"}, bad=BadRows("skip"), words=["several shapes", "f line 5"])
    refused({"text": "t"}, bad=BadRows("skip"), words=["does not fit"])
    refused(*contents, bad=BadRows("error"), words=["f line 1"])


# --- targets --------------------------------------------------------------------------------------


def target(shape: str, row: dict) -> object:
    return read_shape(shape, "f line 1", row).target


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "t", "label": "good"}, Labels(("good",))),
        ({"text": "t", "label": 0}, Labels((0,))),
        ({"sentence": "t", "labels": True}, Labels((True,))),
        ({"text": "t", "labels": ["a", "b"]}, Labels(("a", "b"), many=True)),
        ({"text": "t", "labels": []}, Labels((), many=True)),
        ({"text": "t", "text_pair": "u", "label": 1}, Labels((1,), text_pair="u")),
    ],
)
def test_labels(row: dict, expected: Labels) -> None:
    example = read_shape("classification", "f line 1", row)
    assert example.text == "t"
    assert example.target == expected


def test_tags() -> None:
    assert target("tagging", {"tokens": ["a", "b"], "tags": ["O", "B"]}) == Tags(("a", "b"), ("O", "B"))  # fmt: skip
    assert target("tagging", {"tokens": ["a"], "ner_tags": [3]}) == Tags(("a",), (3,))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": "q", "chosen": MESSAGES, "rejected": [user("q"), assistant("b")]},
        {"chosen": MESSAGES, "rejected": [user("q"), assistant("b")]},
    ],
)
def test_a_preference_in_any_form(row: dict) -> None:
    example = read_shape("preference", "f line 1", row)
    assert example.messages == (user("q"),)
    assert example.target == Preference((assistant("a"),), (assistant("b"),))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "qa", "rejected": "qb"},
        {"chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ],
)
def test_a_preference_of_text_is_no_chat(row: dict) -> None:
    example = read_shape("preference", "f line 1", row)
    assert example.messages == ((user("q"),) if row.get("prompt") else ())
    assert example.target == Preference((assistant("a"),), (assistant("b"),), plain=True)
    (system, asked) = read_shape("preference", "", row | {"prompt": "q", "system": "s"}).messages
    assert (system["content"], asked["content"]) == ("s", "q")  # what only chats have makes it one


@pytest.mark.parametrize(
    ("label", "wanted"), [(True, True), (False, False), (1, True), ("False", False)]
)
def test_a_rating(label: object, wanted: bool) -> None:
    example = read_shape("rating", "f line 1", {"prompt": "q", "completion": "a", "label": label})
    assert example.messages == (user("q"),)
    assert example.target == Rating((assistant("a"),), wanted)


def test_a_span() -> None:
    row = {"question": "q", "context": "a bc", "answers": {"text": ["bc"], "answer_start": [2]}}
    assert target("squad", row) == Span("q", "a bc", ("bc",), (2,))
    row["answers"] = {"text": [], "answer_start": []}
    assert target("squad", row) == Span("q", "a bc", (), ())


@pytest.mark.parametrize(
    ("shape", "row", "words"),
    [
        ("classification", {"text": "t", "label": float("nan")}, ["'label'", "nan"]),
        ("classification", {"text": "t", "labels": ["a", None]}, ["'labels'"]),
        ("classification", {"text": 1, "label": "a"}, ["'text' must be text"]),
        ("classification", {"text": "t", "text_pair": 1, "label": "a"}, ["'text_pair'"]),
        ("tagging", {"tokens": "a b", "tags": [1, 2]}, ["'tokens'"]),
        ("tagging", {"tokens": [], "tags": []}, ["at least one word"]),
        ("tagging", {"tokens": ["a"], "tags": [None]}, ["'tags'"]),
        ("tagging", {"tokens": ["a", "b"], "ner_tags": [1]}, ["2 tokens and 1 ner_tags"]),
        ("preference", {"chosen": [assistant("a")], "rejected": "b"}, ["add a column prompt"]),
        ("preference", {"prompt": "q", "chosen": "qa", "rejected": "qa"}, ["say the same"]),
        ("preference", {"chosen": "a", "rejected": None}, ["'rejected'", "missing"]),
        ("preference", {"prompt": 1, "chosen": "a", "rejected": "b"}, ["'prompt'"]),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, ["say the same"]),
        ("preference", {"chosen": MESSAGES, "rejected": MESSAGES}, ["say the same"]),
        ("preference", {"chosen": MESSAGES, "rejected": [user("q")]}, ["answer of the assistant"]),
        ("preference", {"prompt": "p", "chosen": MESSAGES, "rejected": "b"}, ["answer of the assistant"]),
        ("rating", {"prompt": "q", "completion": "a", "label": 2}, ["'label' must be true or false"]),
        ("rating", {"prompt": "q", "completion": "a", "label": None}, ["'label'"]),
    ],
)  # fmt: skip
def test_a_bad_target_is_named(shape: str, row: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_shape(shape, "f line 1", row)
    for word in ["f line 1", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"text": "t", "label": 1}, "classification"),
        ({"tokens": ["a"], "tags": [1]}, "tagging"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": "q", "completion": "a", "label": True}, "rating"),
    ],
)
def test_shapes_of_other_tasks_are_recognised_and_refused(row: dict, shape: str) -> None:
    words = ["f line 1", f"shape {shape}", "task: chat", "takes messages"]
    refused(row, words=words)


def test_every_shape_is_learnt_by_a_task_or_has_a_target() -> None:
    learnt = {shape for shapes in TASK_SHAPES.values() for shape in shapes}
    assert SHAPES.keys() - learnt == {"rating"}
    assert list(TASK_SHAPES["chat"]) == [s for s in SHAPES if s in TASK_SHAPES["chat"]]


# --- keys -----------------------------------------------------------------------------------------


def test_rows_that_say_the_same_have_the_same_key() -> None:
    answers = {"text": ["a"], "answer_start": [0]}
    keys = {
        example.key
        for row in (
            {"prompt": "a\n\nq", "completion": "a"},
            {"messages": [user("a\n\nq"), assistant("a") | {"weight": 0.5}]},
            {"question": "q", "context": "a", "answers": answers},
        )
        for example in read(row)
    }
    assert len(keys) == 1
    others = [
        {"prompt": "q", "completion": "b"},
        {"prompt": "q", "completion": "a", "tools": [TOOL]},
    ]
    assert len(keys | {example.key for example in read(*others)}) == 3


def test_a_key_says_the_whole_example() -> None:
    for shape, row in {
        "messages": {"messages": MESSAGES, "tools": [TOOL]},
        "text": {"text": '{"said": 1}'},
        "classification": {"text": "t", "labels": ["a", 1], "text_pair": "u"},
        "tagging": {"tokens": ["a"], "tags": ["O"]},
        "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "rating": {"prompt": "q", "completion": "a", "label": True},
        "squad": {"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}},
    }.items():
        example = read_shape(shape, "f line 1", row)
        again = Example.from_key("f line 1", example.key)
        assert again.key == example.key
        assert again.messages == example.messages
        assert again.tools == example.tools
        assert again.text == example.text
        assert again.target == example.target


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q"}, [("user", "q")]),
        ({"prompt": "q", "completion": "a"}, [("user", "q")]),
        ({"prompt": "q", "completion": None, "label": "x"}, [("user", "q")]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [("user", "q")]),
        ({"messages": [user("q")]}, [("user", "q")]),
        ({"messages": MESSAGES}, [("user", "q")]),
        ({"messages": [*MESSAGES, user("r")]}, [*CHAT, ("user", "r")]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [("user", "q")]),
        ({"instruction": "q", "input": "i"}, [("user", "q\n\ni")]),
        ({"question": "q"}, [("user", "q")]),
        ({"query": "q", "response": "a"}, [("user", "q")]),
        ({"question": "q", "context": "c"}, [("user", "c\n\nq")]),
        ({"question": "q", "context": "c", "answer": "a"}, [("user", "c\n\nq")]),
        ({"question": "q", "context": "a", "answers": {"text": ["a"], "answer_start": [0]}}, [("user", "a\n\nq")]),
        ({"article": "d"}, [("user", "d")]),
        ({"dialog": ["q", "a"]}, [("user", "q")]),
    ],
)  # fmt: skip
def test_prompts_end_before_the_last_answer(row: dict, expected: list) -> None:
    assert said(to_prompts(rows(row))[0]) == expected


def test_prompts_keep_their_tools() -> None:
    assert to_prompts(rows({"prompt": "q", "tools": [TOOL]}))[0].tools == (TOOL,)


def test_prompts_that_ask_nothing_are_named() -> None:
    for row, words in [
        ({"text": "t"}, "line 1 has only text; a prompt is a column named prompt"),
        ({"messages": [assistant("a")]}, "line 1 asks nothing"),
        ({"foo": 1}, r"line 1 is of no known shape \(it has foo\)"),
        ({"prompt": 3}, "line 1: 'prompt' must be text"),
    ]:
        with pytest.raises(UserError, match=words):
            to_prompts(rows(row))
    bad = BadRows("skip")
    assert said(to_prompts(rows({"text": "t"}, {"prompt": "q"}), bad)[0]) == [("user", "q")]
    assert bad.count == 1


# --- real rows ------------------------------------------------------------------------------------


def test_real_rows_in_three_shapes_give_equal_messages() -> None:
    package = pytest.importorskip("zaragoza_construction_faq", reason="in the extra `bench`")
    data = Path(package.__file__).parent / "data"

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (data / name).read_text("utf-8").splitlines()]

    alpaca, sharegpt = read(*lines("faq-alpaca.jsonl")), read(*lines("faq-sharegpt.jsonl"))
    with (data / "faq.csv").open(encoding="utf-8-sig", newline="") as table:
        mapped = read(*csv.DictReader(table), columns={"question": "q", "answer": "a"})
    assert len(alpaca) > 400
    assert [e.messages for e in alpaca] == [e.messages for e in sharegpt]
    assert [e.key for e in alpaca] == [e.key for e in mapped]
