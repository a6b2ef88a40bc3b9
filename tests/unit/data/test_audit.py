"""The audit: each planted mistake is found by its check, and clean rows pass."""

from __future__ import annotations

import pytest

from llamaweft.data.audit import audit
from llamaweft.data.chat import encode
from llamaweft.data.formats import Example
from llamaweft.data.holdout import hold_out
from llamaweft.errors import UserError


def chat(*turns: tuple[str, str], where: str = "f line 1") -> Example:
    return Example(where, tuple({"role": role, "content": content} for role, content in turns))


CLEAN = [chat(("user", f"question {i}"), ("assistant", f"answer {i}")) for i in range(4)]


def findings(tokenizer, examples, validation=(), **options) -> dict[str, str]:
    documents = [encode(tokenizer, example) for example in examples]
    settings = {"max_length_tokens": 200, "on_too_long": None, **options}
    found = audit(tokenizer, examples, documents, list(validation), **settings)
    return {f.check: f.status for f in found.findings if f.status != "passed"}


def test_clean_rows_pass(tokenizer) -> None:
    # The embedded model pads with its end of turn; nothing is padded here, so it only warns.
    assert findings(tokenizer, CLEAN) == {"padding_is_end": "warning"}


@pytest.mark.parametrize(
    ("row", "check", "status"),
    [
        (chat(("assistant", "a"), ("user", "q"), ("assistant", "b")), "role_order", "blocking"),
        (chat(("user", "q"), ("user", "r"), ("assistant", "b")), "role_order", "blocking"),
        (chat(("user", "q"), ("assistant", " ")), "empty_answer", "blocking"),
        (chat(("user", "only a question")), "no_trained_token", "blocking"),
        (chat(("user", "q"), ("assistant", "long " * 300)), "too_long", "blocking"),
        (CLEAN[0], "duplicate", "warning"),
        (chat(("user", "write to ann@example.org"), ("assistant", "a")), "personal_data", "warning"),
        (chat(("user", "call +44 20 7946 0958"), ("assistant", "a")), "personal_data", "warning"),
    ],
)  # fmt: skip
def test_a_planted_mistake_is_found(tokenizer, row, check, status) -> None:
    assert findings(tokenizer, [*CLEAN, row]).get(check) == status


def test_a_leak_blocks(tokenizer) -> None:
    assert findings(tokenizer, CLEAN, [CLEAN[2]])["validation_leak"] == "blocking"


def test_a_policy_for_long_rows_turns_the_block_into_a_warning(tokenizer) -> None:
    row = chat(("user", "q"), ("assistant", "long " * 300))
    assert findings(tokenizer, [row], on_too_long="split")["too_long"] == "warning"


def with_template(tokenizer, template: str, examples) -> dict[str, str]:
    original = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        return findings(tokenizer, examples)
    finally:
        tokenizer.chat_template = original


PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_an_answer_without_end_of_turn_blocks(tokenizer) -> None:
    assert with_template(tokenizer, PLAIN, CLEAN)["untrained_end_of_turn"] == "blocking"


def test_a_doubled_begin_of_text_blocks(tokenizer) -> None:
    template = "<|im_start|><|im_start|>" + PLAIN.replace("\n", "<|im_end|>")
    assert with_template(tokenizer, template, CLEAN)["begin_of_text"] == "blocking"


def test_findings_name_the_rows(tokenizer) -> None:
    rows = [chat(("user", "q"), where=f"f line {i}") for i in range(9)]
    documents = [encode(tokenizer, row) for row in rows]
    found = audit(tokenizer, rows, documents, [], max_length_tokens=99, on_too_long=None)
    finding = next(f for f in found.findings if f.check == "no_trained_token")
    assert (finding.count, finding.share) == (9, 1.0)
    assert finding.examples == [f"f line {i}" for i in range(5)]


def test_held_out_rows_never_have_a_twin_in_training() -> None:
    rows = [chat(("user", f"q {i % 6}"), ("assistant", "a")) for i in range(60)]
    held = hold_out(rows, 0.2, seed=0)
    inside = {row.key for row, out in zip(rows, held, strict=True) if out}
    outside = {row.key for row, out in zip(rows, held, strict=True) if not out}
    assert inside
    assert outside
    assert not inside & outside


def test_at_least_one_row_is_held_out() -> None:
    assert hold_out(CLEAN, 0.001, seed=0).sum() == 1
    with pytest.raises(UserError, match=r"validation\.fraction"):
        hold_out([CLEAN[0]] * 3, 0.5, seed=0)
