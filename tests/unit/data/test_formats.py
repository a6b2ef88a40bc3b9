"""Row shapes: recognised, mapped, refused."""

from __future__ import annotations

import pytest

from llamaweft.data.formats import Example, to_examples
from llamaweft.data.sources import Row
from llamaweft.errors import UserError


def read(*contents: dict, task: str = "chat", **options) -> list[Example]:
    return to_examples([Row(f"f line {i + 1}", c) for i, c in enumerate(contents)], task, **options)


def said(example: Example) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in example.messages]


EXCHANGE = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, EXCHANGE),
        ({"prompt": "q", "completion": "a"}, EXCHANGE),
        ({"instruction": "q", "output": "a"}, EXCHANGE),
        ({"instruction": "q", "input": "", "output": "a"}, EXCHANGE),
        ({"instruction": "q", "input": "i", "output": "a"}, [("user", "q\n\ni"), ("assistant", "a")]),
        ({"instruction": "q", "output": "a", "system": "s"}, [("system", "s"), *EXCHANGE]),
    ],
)  # fmt: skip
def test_shapes_are_recognised(row: dict, expected: list) -> None:
    assert said(read(row)[0]) == expected


def test_text_is_for_the_text_task() -> None:
    assert read({"text": "t"}, task="text")[0].text == "t"
    with pytest.raises(UserError, match="does not fit task: chat"):
        read({"text": "t"})
    with pytest.raises(UserError, match="does not fit task: text"):
        read({"prompt": "q", "completion": "a"}, task="text")


def test_columns_are_mapped() -> None:
    mapped = read({"q": "q", "a": "a"}, columns={"prompt": "q", "completion": "a"})
    assert said(mapped[0]) == EXCHANGE
    with pytest.raises(UserError, match=r"line 1 has no column 'x'.*q, a"):
        read({"q": "q", "a": "a"}, columns={"prompt": "x"})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"foo": 1}, ["line 2", "no known shape", "foo"]),
        ({"text": "t"}, ["line 2", "text", "line 1", "prompt_completion"]),
        ({"prompt": 3, "completion": "a"}, ["line 2", "'prompt'", "3"]),
        ({"prompt": "q", "completion": None}, ["line 2", "'completion'"]),
    ],
)
def test_a_bad_row_is_named(row: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read({"prompt": "q", "completion": "a"}, row)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", ["list"]),
        ([], ["at least one"]),
        (["hello"], ["message 1"]),
        ([{"role": "user"}], ["message 1", "'content'"]),
        ([{"role": "user", "content": "q", "tool_calls": [1]}], ["'tool_calls'", "not supported"]),
    ],
)
def test_bad_messages_are_named(messages: object, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read({"messages": messages})
    for word in ["f line 1", *words]:
        assert word in str(caught.value)


def test_rows_that_say_the_same_have_the_same_key() -> None:
    a, b, c = read(
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "b"},
    )
    assert a.key == b.key != c.key
