"""Leakage: held-out texts are found again in what is learnt, whole or in part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaweft.data.leakage import Leakage, composed, ngrams, word_spans


def sentence(seed: int, words: int) -> str:
    return " ".join(f"w{n}" for n in np.random.default_rng(seed).integers(0, 10**6, words))


HELD_OUT = (
    "A building permit is needed for every new house, and it must be asked for before the work "
    "begins; the fee depends on the size of the house and on where in the country it stands, so "
    "ask the municipality for its list of prices."
)


def held_out(*texts: str) -> Leakage:
    leakage = Leakage()
    for number, text in enumerate(texts, start=1):
        leakage.add_reference(f"validation line {number}", text)
    return leakage


def test_an_exact_copy_is_a_leak_and_named() -> None:
    leak = held_out(sentence(0, 50), HELD_OUT).check(f"Question: what now? Answer: {HELD_OUT} Bye.")
    assert leak is not None
    assert (leak.reference_where, leak.share, leak.verdict) == ("validation line 2", 1.0, "leak")
    assert leak.shared == HELD_OUT.rstrip(".")


def test_case_punctuation_and_the_form_of_unicode_hide_no_copy() -> None:
    leakage = held_out(HELD_OUT.replace("list", "café"))
    copy = HELD_OUT.upper().replace(",", " -").replace(";", "\n").replace("LIST", "CAFE\u0301")
    leak = leakage.check(copy)
    assert leak is not None
    assert leak.share == 1.0


def test_one_word_changed_in_forty_is_still_a_leak() -> None:
    words = HELD_OUT.split()[:40]
    leak = held_out(" ".join(words)).check(" ".join([*words[:35], "different", *words[36:]]))
    assert leak is not None
    assert leak.verdict == "leak"
    assert leak.shared == " ".join(words[:35])


def test_one_run_of_thirteen_words_is_an_overlap_and_one_of_twelve_is_nothing() -> None:
    words = HELD_OUT.split()
    leakage = held_out(HELD_OUT)
    leak = leakage.check(f"{sentence(1, 30)} {' '.join(words[5:18])} {sentence(2, 30)}")
    assert leak is not None
    assert leak.verdict == "overlap"
    assert leak.share == pytest.approx(1 / (len(words) - 12))
    assert leak.shared == " ".join(words[5:18]).rstrip(",;")
    assert leakage.check(f"{sentence(1, 30)} {' '.join(words[5:17])} {sentence(2, 30)}") is None


def test_the_shared_text_ends_at_the_first_gap() -> None:
    words = HELD_OUT.split()
    leak = held_out(HELD_OUT).check(f"{' '.join(words[:14])} then {' '.join(words[20:40])}")
    assert leak is not None
    assert leak.shared == " ".join(words[:14])


def test_half_of_a_text_is_a_leak_and_less_is_an_overlap() -> None:
    words = sentence(3, 32).split()  # 20 n-grams
    for count, verdict in ((22, "leak"), (21, "overlap")):  # 10 of them, and 9
        leak = held_out(" ".join(words)).check(" ".join(words[:count]))
        assert leak is not None
        assert leak.verdict == verdict


def test_a_text_that_is_spread_over_the_training_rows_is_a_leak() -> None:
    words = sentence(4, 52).split()  # 40 n-grams
    leakage = held_out(sentence(5, 30), " ".join(words))
    pieces = [" ".join(words[start : start + 20]) for start in (0, 16, 32)]
    assert [leakage.check(piece).verdict for piece in pieces] == ["overlap"] * 3
    (found,) = leakage.found()
    assert (found.reference_where, found.verdict) == ("validation line 2", "leak")
    assert found.share == 24 / 40
    assert found.shared == pieces[0]


def test_what_was_not_found_is_not_in_the_findings() -> None:
    leakage = held_out(HELD_OUT)
    assert leakage.found() == []
    assert leakage.check(sentence(6, 60)) is None
    assert leakage.found() == []


def test_wording_that_everything_shares_is_not_flagged() -> None:
    prompt = "You are a helpful assistant who answers in one short sentence and never says anything rude."
    boilerplate = [f"{prompt} {sentence(seed, 30)}" for seed in range(11)]
    assert held_out(*boilerplate).check(f"{prompt} {sentence(99, 30)}") is None
    # With ten of them it is still something that they might have in common by mistake.
    assert held_out(*boilerplate[:10]).check(f"{prompt} {sentence(99, 30)}") is not None


def test_common_wording_does_not_hide_a_copy() -> None:
    prompt = "You are a helpful assistant who answers in one short sentence and never says anything rude."
    boilerplate = [f"{prompt} {sentence(seed, 30)}" for seed in range(11)]
    leak = held_out(*boilerplate).check(boilerplate[4])
    assert leak is not None
    assert (leak.reference_where, leak.share) == ("validation line 5", 1.0)


def test_the_largest_share_is_named() -> None:
    both = sentence(7, 20)
    leakage = held_out(f"{both} {sentence(8, 100)}", f"{both} {sentence(9, 20)}")
    leak = leakage.check(both)
    assert leak is not None
    assert leak.reference_where == "validation line 2"
    assert [found.shared for found in leakage.found()] == [both, both]


def test_short_texts_are_compared_as_a_whole() -> None:
    leakage = held_out("The answer is forty-two.")
    assert leakage.check("the answer is FORTY TWO").verdict == "leak"
    assert leakage.check("the answer is forty two indeed") is None
    assert leakage.check(f"{sentence(1, 20)} the answer is forty two") is None


@pytest.mark.parametrize("text", ["", " ", "?!", "\ud800"])
def test_texts_without_words_are_not_compared(text: str) -> None:
    leakage = held_out(text, HELD_OUT)
    assert leakage.check(text) is None
    assert leakage.check(HELD_OUT).reference_where == "validation line 2"


def test_nothing_is_found_where_nothing_is_held_out() -> None:
    leakage = Leakage()
    assert leakage.check(HELD_OUT) is None
    assert leakage.found() == []


def test_held_out_texts_come_first() -> None:
    leakage = held_out(HELD_OUT)
    leakage.check("anything")
    with pytest.raises(RuntimeError, match="before anything is checked"):
        leakage.add_reference("validation line 2", HELD_OUT)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("one two_three 4", 4),
        ("Straße", 1),
        ("İstanbul", 1),
        ("हिन्दी भाषा", 2),
        ("你好吗", 3),
        ("สวัสดี hello", 5),
        ("Привет, мир", 2),
    ],
)
def test_words_of_many_scripts(text: str, count: int) -> None:
    assert len(word_spans(text)) == count
    assert len(ngrams(text, 1)) == count


def test_a_copy_in_a_script_without_spaces_is_found() -> None:
    chinese = "建造新房屋需要建筑许可证并且必须在开工之前提出申请费用取决于房屋的大小"
    leak = held_out(chinese).check(f"问题 怎么办 {chinese}。")
    assert leak is not None
    assert (leak.share, leak.shared) == (1.0, chinese)


def test_numbers_of_runs_are_the_same_on_every_machine() -> None:
    assert ngrams("One two, three", 2).tolist() == ngrams("one TWO three", 2).tolist()
    assert ngrams("one two three", 2).tolist() == [2072754952252528903, 6861942822944202332]


@given(st.lists(st.sampled_from(["a", "B", "ä", "你"]), max_size=40), st.integers(1, 15))
def test_runs_are_equal_exactly_where_their_words_are(words: list[str], size: int) -> None:
    found = ngrams(" ".join(words), size).tolist()
    size = min(size, len(words))
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)] if words else []
    assert len(found) == len(runs)
    assert len(set(found)) == len(set(runs))


def test_a_text_longer_than_any_usual_run_is_one_run_of_all_its_words() -> None:
    words = sentence(1, 200).split()
    whole = ngrams(" ".join(words), 10**9)
    assert len(whole) == 1
    assert ngrams(" ".join([*words[:100], *words[101:], words[100]]), 10**9) != whole
    assert ngrams(" ".join([*words[:199], "other"]), 199)[0] == ngrams(" ".join(words), 199)[0]


@given(st.text(st.characters(), max_size=200))
def test_the_words_that_are_hashed_are_those_that_are_shown(text: str) -> None:
    assert len(ngrams(text, 1)) == len(word_spans(composed(text)))
