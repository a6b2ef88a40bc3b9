"""The general prompts that ship with the package, and what a model reads of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from llamaweft import settings
from llamaweft.data.general import AREAS, general_prompts, read_general, shipped
from llamaweft.errors import UserError


def test_there_are_at_least_forty_different_prompts_of_each_area() -> None:
    assert tuple(shipped()) == AREAS
    assert all(len(prompts) >= 40 for prompts in shipped().values())
    every = [prompt for prompts in shipped().values() for prompt in prompts]
    assert len(every) == settings.GENERAL_PROMPTS
    assert len(AREAS) == settings.AREAS
    asked = Counter(" ".join(prompt.prompt.lower().split()) for prompt in every)
    assert max(asked.values()) == 1, asked.most_common(1)
    assert len({prompt.where for prompt in every}) == len(every)


def test_no_prompt_is_empty_or_long() -> None:
    for prompt in (prompt for prompts in shipped().values() for prompt in prompts):
        assert prompt.prompt == prompt.prompt.strip()
        assert prompt.answer == prompt.answer.strip()
        assert 10 <= len(prompt.prompt) <= 220, prompt.where
        assert 3 <= len(prompt.answer) <= 320, prompt.where
        assert prompt.answer not in prompt.prompt


def test_some_are_taken_evenly_over_the_areas() -> None:
    for count in (5, 12, 40, 200, 210):
        chosen = general_prompts(count)
        assert len({prompt.where for prompt in chosen}) == len(chosen) == count
        by_area = Counter(prompt.area for prompt in chosen)
        assert max(by_area.values()) - min(by_area.values()) <= 1
    places = [int(prompt.where.split()[1]) for prompt in general_prompts(20)[:4]]
    assert places == [1, 11, 22, 32]  # spread over the list, not its beginning
    with pytest.raises(ValueError, match="facts has 42 prompts"):
        general_prompts(300)


def test_a_chats_labels_are_the_answer_and_the_end_of_its_turn(tokenizer) -> None:
    general = read_general(general_prompts(10), tokenizer)
    for prompt, document, ids in zip(
        general.prompts, general.documents, general.prompt_ids, strict=True
    ):
        said = tokenizer.decode(document.ids[document.weights > 0])
        assert said == f"{prompt.answer}<|im_end|>"
        assert tokenizer.decode(ids).endswith(f"{prompt.prompt}<|im_end|>\n<|im_start|>assistant\n")
        assert document.ids[: len(ids)].tolist() == ids
    assert general.labels == sum(int((d.weights > 0).sum()) for d in general.documents)


def test_without_a_chat_template_prompts_are_plain_text(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    general = read_general(general_prompts(10), tokenizer)
    for prompt, document, ids in zip(
        general.prompts, general.documents, general.prompt_ids, strict=True
    ):
        assert tokenizer.decode(document.ids[document.weights > 0]) == f"{prompt.answer}<|im_end|>"
        assert tokenizer.decode(ids) == f"{prompt.prompt}\n"
        assert document.ids[: len(ids)].tolist() == ids


def test_batches_hold_every_document_once_and_no_more_tokens_than_asked(tokenizer) -> None:
    general = read_general(general_prompts(20), tokenizer)
    batches = list(general.batches(300))
    assert [d for batch in batches for d in batch] == general.documents
    assert len(batches) > 2
    assert all(sum(len(d.ids) for d in batch) <= 300 for batch in batches)
    assert [len(batch) for batch in general.batches(1)] == [1] * 20


def test_no_token_that_the_model_did_not_have_is_a_label(tokenizer) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = read_general(general_prompts(10), tokenizer)
    general = read_general(general_prompts(10), tokenizer, {end})
    assert general.labels == plain.labels - 10
    for document, other in zip(general.documents, plain.documents, strict=True):
        assert np.array_equal(document.ids, other.ids)
        assert not document.weights[document.ids == end].any()
    with pytest.raises(UserError, match="no token of the general prompts"):
        read_general(general_prompts(10), tokenizer, range(100_000))
