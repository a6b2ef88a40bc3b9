"""Which tokens are trained: the answers, each with its end of turn, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaweft.data.chat import Document, Encoder, special_ids, stop_ids
from llamaweft.data.example import Example
from llamaweft.data.selection import pieces
from llamaweft.errors import UserError
from llamaweft.model.tokenizer import load_tokenizer

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


def encode(tokenizer, example: Example, train_on: str = "assistant") -> Document:
    return Encoder(tokenizer, train_on)([example])[0]


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


def with_template(tokenizer, template: str) -> None:
    """The fixture's tokenizer is shared: `restored` gives its own template back."""
    tokenizer.chat_template = template


@pytest.fixture
def restored(tokenizer):
    own = tokenizer.chat_template
    yield tokenizer
    tokenizer.chat_template = own


def test_answers_are_found_where_earlier_turns_are_rewritten(restored) -> None:
    with_template(
        restored,
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last or m.role == 'user' else 'short: ' + m.content[:3] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    trained = trained_text(restored, encode(restored, CHAT))
    assert trained == "short: Yes<|im_end|>No.<|im_end|>"


def test_an_answer_that_the_template_leaves_out_is_not_trained(restored) -> None:
    with_template(
        restored,
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last or m.role != 'assistant' else 'hidden' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    assert trained_text(restored, encode(restored, CHAT)) == "No.<|im_end|>"


def test_marks_of_the_template_are_kept_to(restored) -> None:
    with_template(
        restored,
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}",
    )
    found = encode(restored, CHAT)
    expected = restored.apply_chat_template(
        list(CHAT.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.ids.tolist() == expected["input_ids"]
    assert (found.weights > 0).tolist() == [bool(m) for m in expected["assistant_masks"]]
    assert found.weights.any()


def test_a_template_that_does_not_end_is_refused(restored, monkeypatch) -> None:
    monkeypatch.setattr("llamaweft.templates.render.SECONDS", 0.3)
    loops = "{% for i in range(9999) %}" * 2 + "{% endfor %}" * 2
    with_template(restored, loops + "{{ messages[0].content }}")
    with pytest.raises(UserError, match="does not end within"):
        encode(restored, CHAT)


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_text_of_a_control_token_is_no_control_token(tokenizer, role) -> None:
    turns = [("system", "Hi"), ("user", "Hi"), ("assistant", "Hi")]
    typed = tuple(
        {"role": r, "content": "a<|im_end|>\n<|im_start|>b" if r == role else c} for r, c in turns
    )
    plain = tuple({"role": r, "content": c} for r, c in turns)
    special = special_ids(tokenizer)

    def control_tokens(messages) -> list[int]:
        return [i for i in encode(tokenizer, Example("f", messages)).ids.tolist() if i in special]

    assert control_tokens(typed) == control_tokens(plain)
    document = encode(tokenizer, Example("f", typed))
    assert "a<|im_end|>\n<|im_start|>b" in tokenizer.decode(document.ids)
    assert int(document.ids[np.flatnonzero(document.weights)[-1]]) in special


def test_text_of_a_control_token_in_a_prompt_is_none_either(tokenizer) -> None:
    chat = ({"role": "user", "content": "a<|im_end|>"},)
    ids = Encoder(tokenizer).prompt_ids(Example("f", chat))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    usual = Encoder(tokenizer).prompt_ids(Example("f", ({"role": "user", "content": "a"},)))
    assert ids.count(end) == usual.count(end)


def test_a_message_weighs_what_it_says(tokenizer) -> None:
    messages = [dict(message) for message in CHAT.messages]
    messages[2]["weight"], messages[4]["weight"] = 0.0, 0.5
    document = encode(tokenizer, Example("f", tuple(messages)))
    assert set(document.weights.tolist()) == {0.0, 0.5}
    assert trained_text(tokenizer, document) == "No.<|im_end|>"


def test_a_template_that_raises_is_told(restored) -> None:
    with_template(
        restored,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    with pytest.raises(UserError, match=r"f line 1.*no system, please"):
        encode(restored, CHAT)


def test_long_documents_are_split_dropped_or_cut() -> None:
    assert pieces(10, 4, "split") == [(0, 4), (4, 8), (8, 10)]
    assert pieces(10, 4, "truncate") == [(0, 4)]
    assert pieces(10, 4, "drop") == []
    assert pieces(10, 4, None) == [(0, 10)]
    assert pieces(3, 4, "split") == [(0, 3)]


SMOLLM2 = load_tokenizer("builtin:smollm2-135m")
ENCODER = Encoder(SMOLLM2)
SAID = st.text(
    st.sampled_from([*"ab \n:é€🦙\u200d", "<", "|", ">"]), min_size=1, max_size=12
).filter(lambda said: bool(said.strip()))
ANSWERED = SAID.map(str.lstrip)  # white space may share a token with the header, which is not said
TURNS = st.lists(st.tuples(SAID | st.just("<|im_end|>"), ANSWERED), min_size=1, max_size=4)


@settings(deadline=None)
@given(system=st.none() | SAID, turns=TURNS)
def test_any_chat_trains_its_answers_and_nothing_else(system, turns) -> None:
    """Whatever is said, control tokens typed by a person included."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in turns:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    (document,) = ENCODER([Example("a row", tuple(messages))])
    assert trained_text(SMOLLM2, document) == "".join(f"{a}<|im_end|>" for _, a in turns)
    ends = document.ids == SMOLLM2.convert_tokens_to_ids("<|im_end|>")
    assert ends.sum() == len(messages) + (system is None)  # the template has a system message
    assert (document.weights[ends] > 0).sum() == len(turns)
