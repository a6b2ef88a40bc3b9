"""The audit: each planted mistake is found by its check, and clean rows pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llamaweft.data.audit import BLOCKING, REMEDIES
from llamaweft.data.holdout import hold_out
from llamaweft.data.prepare import Preparation, Prepared
from llamaweft.data.sources import PlainSource
from llamaweft.errors import UserError
from llamaweft.settings import AuditSettings


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CLEAN = [chat(("user", f"question {i}"), ("assistant", f"answer {i}")) for i in range(4)]
LONG = " ".join(f"word{i}" for i in range(40))


@pytest.fixture
def prepare(tokenizer, tmp_path: Path, monkeypatch):
    """Rows, and held-out ones, as a recipe prepares them."""
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))

    def prepared(rows: list[dict], validation: list[dict] | None = None, **options) -> Prepared:
        settings = {
            "task": "chat",
            "train_on": "assistant",
            "max_length_tokens": 200,
            "on_too_long": None,
            "seed": 0,
            **options,
        }
        train = PlainSource(write(tmp_path / "rows.jsonl", rows))
        held = (
            None if validation is None else PlainSource(write(tmp_path / "held.jsonl", validation))
        )
        return Preparation(tokenizer, **settings).prepare([(train, 1.0)], held, None)

    return prepared


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def statuses(prepared: Prepared) -> dict[str, str]:
    return {f.check: f.status for f in prepared.audit.findings if f.status != "passed"}


def test_clean_rows_pass(prepare) -> None:
    # The embedded model pads with its end of turn; nothing is padded here, so it only warns.
    assert statuses(prepare(CLEAN)) == {"padding_is_end": "warning"}


@pytest.mark.parametrize(
    ("row", "check", "status"),
    [
        (chat(("assistant", "a"), ("user", "q"), ("assistant", "b")), "role_order", "blocking"),
        (chat(("user", "q"), ("user", "r"), ("assistant", "b")), "role_order", "blocking"),
        (chat(("system", "only a system message")), "role_order", "blocking"),
        (chat(("user", "q"), ("assistant", " ")), "empty_answer", "blocking"),
        (chat(("user", "only a question")), "no_trained_token", "blocking"),
        (chat(("user", "q"), ("assistant", "long " * 300)), "too_long", "blocking"),
        (CLEAN[0], "duplicate", "warning"),
        (chat(("user", "write to ann@example.org"), ("assistant", "a")), "personal_data", "warning"),
        (chat(("user", "call +44 20 7946 0958"), ("assistant", "a")), "personal_data", "warning"),
        (chat(("user", "q<|im_end|>"), ("assistant", "a")), "control_token_text", "warning"),
    ],
)  # fmt: skip
def test_a_planted_mistake_is_found(prepare, row, check, status) -> None:
    assert statuses(prepare([*CLEAN, row])).get(check) == status


def test_a_leak_blocks(prepare) -> None:
    assert statuses(prepare(CLEAN, [CLEAN[2]]))["validation_leak"] == "blocking"


@pytest.mark.parametrize(
    ("held", "check"),
    [
        (chat(("user", "Who, then, is it?"), ("assistant", LONG.upper() + "!")), "validation_leak"),
        (chat(("user", "who then is it"), ("assistant", LONG[:200])), "validation_leak"),
        (chat(("user", "something else"), ("assistant", LONG)), "validation_overlap"),
        (chat(("user", "who then is it"), ("assistant", "no one")), None),
    ],
)
def test_a_held_out_row_that_is_nearly_in_the_training_rows_is_found(prepare, held, check) -> None:
    row = chat(("user", "who then is it"), ("assistant", LONG))
    found = statuses(prepare([*CLEAN, row], [held]))
    assert found.get(check) == {"validation_leak": "blocking"}.get(check, check and "warning")
    assert not {"validation_leak", "validation_overlap"} - {check} & found.keys()


def test_what_the_recipe_allows_does_not_block(prepare) -> None:
    row = chat(("user", "q"), ("user", "r"), ("assistant", "b"))
    found = prepare([*CLEAN, row], allow=["role_order"]).audit
    assert {f.check: f.status for f in found.findings}["role_order"] == "allowed"
    assert not found.blocking
    assert prepare([*CLEAN, row], allow=["empty_answer"]).audit.blocking


def test_the_recipe_names_what_blocks() -> None:
    (names,) = (AuditSettings.model_json_schema()["properties"]["allow"]["items"].get("enum"),)
    assert tuple(names) == BLOCKING
    assert set(BLOCKING) <= set(REMEDIES)


def test_a_policy_for_long_rows_turns_the_block_into_a_warning(prepare) -> None:
    row = chat(("user", "q"), ("assistant", "long " * 300))
    assert statuses(prepare([row], on_too_long="split"))["too_long"] == "warning"


def test_one_answer_for_nearly_all_rows_is_a_warning(prepare) -> None:
    rows = [chat(("user", f"q {i}"), ("assistant", "yes" if i else "no")) for i in range(60)]
    found = {f.check: f for f in prepare(rows).audit.findings}["label_balance"]
    assert (found.status, found.count) == ("warning", 59)
    assert "yes" in found.remedy
    rows = [chat(("user", f"q {i}"), ("assistant", "yes" if i % 2 else "no")) for i in range(60)]
    assert "label_balance" not in statuses(prepare(rows))


def test_tokens_that_the_model_lacks_or_never_learnt_block(prepare, tokenizer) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert statuses(prepare(CLEAN, untrained=[end]))["untrained_token"] == "blocking"
    assert statuses(prepare(CLEAN, untrained=[5]))["padding_is_end"] == "warning"
    assert statuses(prepare(CLEAN, vocab_size=300))["out_of_vocabulary"] == "blocking"
    assert "out_of_vocabulary" not in statuses(prepare(CLEAN, vocab_size=len(tokenizer)))


@pytest.fixture
def templated(tokenizer, prepare):
    original = tokenizer.chat_template

    def found(template: str, rows: list[dict]) -> dict[str, str]:
        tokenizer.chat_template = template
        return statuses(prepare(rows))

    yield found
    tokenizer.chat_template = original


PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_an_answer_without_end_of_turn_blocks(templated) -> None:
    assert templated(PLAIN, CLEAN)["untrained_end_of_turn"] == "blocking"


def test_a_doubled_begin_of_text_blocks(templated) -> None:
    template = "<|im_start|><|im_start|>" + PLAIN.replace("\n", "<|im_end|>")
    assert templated(template, CLEAN)["begin_of_text"] == "blocking"


def test_a_template_that_changes_what_is_said_is_a_warning(templated) -> None:
    template = PLAIN.replace("m.content", "m.content | trim").replace("\n", "<|im_end|>")
    assert "content_changed" not in templated(template, CLEAN)
    row = chat(("user", "q"), ("assistant", "  indented"))
    assert templated(template, [row])["content_changed"] == "warning"


def test_findings_name_the_rows(prepare, tmp_path: Path) -> None:
    found = prepare([chat(("user", f"q {i}")) for i in range(9)]).audit
    finding = next(f for f in found.findings if f.check == "no_trained_token")
    assert (finding.count, finding.share) == (9, 1.0)
    assert finding.examples == [f"{tmp_path}/rows.jsonl line {i}" for i in range(1, 6)]
    assert (found.rows, found.validation_rows, found.trained_tokens) == (9, 0, 0)


def test_held_out_rows_never_have_a_twin_in_training() -> None:
    keys = np.arange(60, dtype=np.uint64) % 6
    held = hold_out(keys, 0.2, seed=0)
    assert set(keys[held])
    assert set(keys[~held])
    assert not set(keys[held]) & set(keys[~held])
    order = np.random.default_rng(0).permutation(60)
    assert (hold_out(keys[order], 0.2, seed=0) == held[order]).all()


def test_at_least_one_row_is_held_out() -> None:
    assert hold_out(np.arange(4, dtype=np.uint64), 0.001, seed=0).sum() == 1
    with pytest.raises(UserError, match=r"validation\.fraction"):
        hold_out(np.zeros(3, np.uint64), 0.5, seed=0)
