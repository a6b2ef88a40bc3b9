"""Generation: the cache changes nothing, batches change nothing, transformers agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llamaweft.data.chat import Document
from llamaweft.errors import UserError
from llamaweft.generate import generate
from llamaweft.generate.chat import Chat
from llamaweft.generate.generate import Session, generate_batch, generate_stream
from llamaweft.generate.sampling import Sampling, sample
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack

RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(3, 900, n).tolist() for n in (7, 31, 12, 1)]
BEGINNING = RANDOM.integers(3, 900, 40).tolist()
ALIKE = [BEGINNING + RANDOM.integers(3, 900, n).tolist() for n in (1, 20, 5)] + [BEGINNING]
"""What the last one is, the others begin with."""


@pytest.fixture(scope="module")
def model(tiny_folder: Path):
    return load_causal_lm(tiny_folder, base_weights="fp32").eval()


def last_logits(model, ids: list[int]) -> torch.Tensor:
    document = Document(np.array(ids), np.zeros(len(ids), np.float32), "")
    with torch.no_grad():
        return model(Pack.from_documents([document]))[-1]


@pytest.mark.parametrize("prompts", [PROMPTS, ALIKE], ids=["apart", "alike"])
def test_the_cache_gives_the_logits_of_a_full_pass(model, prompts: list[list[int]]) -> None:
    session = Session(model, len(prompts), 70)
    with torch.inference_mode():
        logits = session.prefill(prompts)
        longer = [list(p) for p in prompts]
        for _ in range(4):
            for row, ids in enumerate(longer):
                torch.testing.assert_close(logits[row], last_logits(model, ids), rtol=0, atol=1e-5)
            following = logits.argmax(-1)
            for ids, token in zip(longer, following.tolist(), strict=True):
                ids.append(token)
            logits = session.decode(following)


def test_greedy_answers_are_those_of_transformers(model, tiny_folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    answers = generate_batch(model, PROMPTS, set(), max_new_tokens=12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None
        )
        assert answer.ids == expected[0, len(prompt) :].tolist()
        assert answer.finish == "length"


def test_a_stop_token_ends_one_answer_and_not_its_neighbours(model) -> None:
    free = generate_batch(model, PROMPTS, set(), max_new_tokens=12)
    stop = free[1].ids[3]
    stopped = generate_batch(model, PROMPTS, {stop}, max_new_tokens=12)
    for before, after in zip(free, stopped, strict=True):
        stops = stop in before.ids
        assert after.ids == (before.ids[: before.ids.index(stop)] if stops else before.ids)
        assert after.finish == ("stop" if stops else "length")
    assert len(stopped[1].ids) <= 3


def test_an_answer_ends_with_the_token_that_completes_it(model) -> None:
    free = generate_batch(model, PROMPTS, set(), max_new_tokens=12)
    pair = free[2].ids[4:6]
    ended = generate_batch(
        model, PROMPTS, set(), max_new_tokens=12, is_complete=lambda ids: list(ids[-2:]) == pair
    )
    for row, (before, after) in enumerate(zip(free, ended, strict=True)):
        assert after.ids == (before.ids[:6] if row == 2 else before.ids)
        assert after.finish == ("stop" if row == 2 else "length")


def test_small_batches_give_the_same_answers(model) -> None:
    whole = generate_batch(model, PROMPTS, set(), max_new_tokens=6)
    done: list[int] = []
    alone = generate_batch(
        model, PROMPTS, set(), max_new_tokens=6, cache_bytes=1, progress=done.append
    )
    assert alone == whole
    assert sorted(set(done)) == [0, 1, 2, 3, 4]  # told for every token, too
    assert done == sorted(done)


def test_prompts_are_read_a_few_at_a_time(model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate_batch(model, PROMPTS, set(), max_new_tokens=6)
    read: list[int] = []
    prefill = Session._prefill
    monkeypatch.setattr(
        Session, "_prefill", lambda s, f, p: read.append(len(p)) or prefill(s, f, p)
    )
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 20)
    assert generate_batch(model, PROMPTS, set(), max_new_tokens=6) == whole
    assert read == [3, 1]  # 1 + 7 + 12 tokens, then 31


def test_an_answer_ends_where_the_context_does(model) -> None:
    context = model.config.max_position_embeddings
    long = RANDOM.integers(3, 900, context - 3).tolist()
    short, cut = generate_batch(model, [PROMPTS[0], long], set(), max_new_tokens=6)
    assert (len(short.ids), len(cut.ids), cut.finish) == (6, 3, "length")


def test_a_stream_goes_on_where_the_session_ended(model) -> None:
    session = Session(model, 1, 64)
    greedy = Sampling()
    first = list(generate_stream(session, PROMPTS[0], set(), max_new_tokens=5, sampling=greedy))
    more = list(generate_stream(session, PROMPTS[2], set(), max_new_tokens=5, sampling=greedy))
    history = PROMPTS[0] + first + PROMPTS[2]
    assert more == generate_batch(model, [history], set(), max_new_tokens=5)[0].ids


def test_a_prompt_that_does_not_fit_is_refused(model) -> None:
    session = Session(model, 1, 8)
    with pytest.raises(UserError, match=r"31 tokens.*room for 8"):
        list(generate_stream(session, PROMPTS[1], set(), max_new_tokens=5, sampling=Sampling()))


def test_a_chat_reads_each_turn_once_and_answers_as_if_anew(model, tokenizer) -> None:
    def chat() -> Chat:
        return Chat(
            model,
            tokenizer,
            stop_ids=set(),
            system="Be brief.",
            max_new_tokens=6,
            sampling=Sampling(),
        )

    talk = chat()
    first = "".join(talk.ask("Hello"))
    second = "".join(talk.ask("And?"))
    anew = chat()
    anew.messages += [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
    ]
    assert "".join(anew.ask("And?")) == second
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]


def test_sampling() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> list[float]:
        drawn = sample(logits, sampling, generator)
        return (torch.bincount(drawn, minlength=4) / 4000).tolist()

    assert shares(Sampling(0.0)) == [1, 0, 0, 0]
    assert shares(Sampling(1.0)) == pytest.approx(logits[0].softmax(0).tolist(), abs=0.03)
    halved = (logits[0] / 0.5).softmax(0)
    assert shares(Sampling(0.5)) == pytest.approx(halved.tolist(), abs=0.03)
    assert shares(Sampling(1.0, top_k=1)) == [1, 0, 0, 0]
    two = shares(Sampling(1.0, top_p=0.7))  # 0.64 alone is less than 0.7, so the second counts
    assert two[2:] == [0, 0]
    assert two[1] > 0.2
