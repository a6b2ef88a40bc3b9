"""Which tokens are trained: the answers, each with its end of turn, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from llamaweft.data.chat import Document, encode, fit_length, stop_ids
from llamaweft.data.formats import Example
from llamaweft.errors import UserError

CHAT = Example(
    "f line 1",
    tuple(
        {"role": role, "content": content}
        for role, content in [
            ("system", "Be brief."),
            ("user", "Héllo 🦙?"),
            ("assistant", "Yes: naïve 🦙 "),
            ("user", "And?"),
            ("assistant", "No."),
        ]
    ),
)


def trained_text(tokenizer, document: Document) -> str:
    return tokenizer.decode(document.ids[document.weights > 0])


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", "Yes: naïve 🦙 <|im_end|>No.<|im_end|>"),
        ("last", "No.<|im_end|>"),
    ],
)
def test_answers_with_their_end_of_turn_are_trained(tokenizer, train_on, expected) -> None:
    assert trained_text(tokenizer, encode(tokenizer, CHAT, train_on)) == expected


def test_a_token_that_begins_in_the_header_is_not_trained(tokenizer) -> None:
    chat = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "  indented"})
    document = encode(tokenizer, Example("f", chat))
    assert trained_text(tokenizer, document).strip() == "indented<|im_end|>"
    prompt = "<|im_start|>assistant\n"
    context = tokenizer.decode(document.ids[document.weights == 0])
    assert context.count(prompt) == 1


def test_all_trains_every_token(tokenizer) -> None:
    document = encode(tokenizer, CHAT, "all")
    assert document.weights.all()
    assert document.trained_tokens == len(document.ids) - 1


def test_ids_are_those_of_the_template(tokenizer) -> None:
    expected = tokenizer.apply_chat_template(list(CHAT.messages), tokenize=True, return_dict=False)
    assert encode(tokenizer, CHAT).ids.tolist() == expected


def test_a_row_without_answer_has_nothing_to_train(tokenizer) -> None:
    question = Example("f", ({"role": "user", "content": "q"},))
    assert encode(tokenizer, question).trained_tokens == 0


def test_text_ends_with_the_end_token(tokenizer) -> None:
    document = encode(tokenizer, Example("f", text="Once upon a time"))
    assert document.ids[-1] == tokenizer.eos_token_id
    assert document.trained_tokens == len(document.ids) - 1


def test_the_stop_token_is_the_end_of_turn(tokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stop_ids(tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer) -> None:
    original = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content if loop.last or m.role == 'user' else 'hidden' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    try:
        with pytest.raises(UserError, match=r"f line 1.*earlier turn.*train_on: last"):
            encode(tokenizer, CHAT)
    finally:
        tokenizer.chat_template = original


def test_a_template_that_raises_is_told(tokenizer) -> None:
    original = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(UserError, match=r"f line 1.*roles must alternate"):
            encode(tokenizer, CHAT)
    finally:
        tokenizer.chat_template = original


def test_long_documents_are_split_dropped_or_cut() -> None:
    long = Document(np.arange(10, dtype=np.int32), np.ones(10, np.float32), "f", "k")
    short = Document(np.arange(3, dtype=np.int32), np.ones(3, np.float32), "f", "k")

    def ids(policy: str | None) -> list[list[int]]:
        return [d.ids.tolist() for d in fit_length([long, short], 4, policy)]

    assert ids("split") == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2]]
    assert ids("truncate") == [[0, 1, 2, 3], [0, 1, 2]]
    assert ids("drop") == [[0, 1, 2]]
    assert ids(None) == [list(range(10)), [0, 1, 2]]
