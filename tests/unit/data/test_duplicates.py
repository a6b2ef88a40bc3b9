"""Rows that are there more than once, word for word or nearly."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaweft.data.duplicates import NearDuplicates, repeated
from llamaweft.errors import UserError


def sentence(seed: int, words: int) -> list[str]:
    return [f"w{n}" for n in np.random.default_rng(seed).integers(0, 10**6, words)]


KEYS = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3))


def hashes(keys: list[int]) -> np.ndarray:
    return np.array(keys, np.uint64)


def test_all_but_the_first_of_equal_keys_are_marked() -> None:
    keys = hashes([7, 2**64 - 1, 7, 0, 7, 2**64 - 1])
    assert repeated(keys).tolist() == [False, False, True, False, True, True]


@given(KEYS, st.randoms())
def test_the_order_of_the_rows_does_not_change_which_keys_stay(keys: list[int], random) -> None:
    shuffled = random.sample(keys, len(keys))
    for order in (keys, shuffled):
        kept = hashes(order)[~repeated(hashes(order))]
        assert sorted(kept.tolist()) == sorted(set(keys))


@given(KEYS)
def test_a_key_is_marked_exactly_when_it_was_there_before(keys: list[int]) -> None:
    expected = [key in keys[:i] for i, key in enumerate(keys)]
    assert repeated(hashes(keys)).tolist() == expected


@settings(max_examples=60)
@given(st.text(st.characters()), st.sampled_from([0.3, 0.8, 1.0]))
def test_a_row_is_its_own_near_duplicate(text: str, threshold: float) -> None:
    search = NearDuplicates(threshold)
    assert search.add(3, text) is None
    assert search.add(4, text) == 3


def test_case_and_punctuation_make_no_other_row() -> None:
    search = NearDuplicates(0.8)
    assert search.add(0, "The café is open, from nine until five o'clock.") is None
    assert search.add(1, "the CAFÉ is open from Nine until Five o'clock") == 0
    assert search.add(2, "the cafe\u0301 is open from nine until five o'clock") == 0


@pytest.mark.parametrize(("words", "threshold"), [(40, 0.65), (70, 0.75), (100, 0.8)])
def test_one_word_changed_is_near_where_the_text_is_long_enough(
    words: int, threshold: float
) -> None:
    # The five shingles around it differ. Of 40 words that leaves 31 of 41 shared, 0.76.
    found = 0
    for seed in range(40):
        text = sentence(seed, words)
        search = NearDuplicates(threshold)
        search.add(0, " ".join(text))
        found += search.add(1, " ".join([*text[:20], "another", *text[21:]])) == 0
    assert found >= 38


def test_one_word_changed_in_forty_is_too_much_for_a_threshold_of_0_9() -> None:
    text = sentence(1, 40)
    search = NearDuplicates(0.9)
    search.add(0, " ".join(text))
    assert search.add(1, " ".join([*text[:20], "another", *text[21:]])) is None


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_pairs_on_both_sides_of_the_threshold_are_told_apart(threshold: float) -> None:
    found = {"more": 0, "less": 0}
    for seed in range(40):
        words = sentence(seed, 304)  # 300 shingles
        for side, share in (("more", threshold + 0.08), ("less", threshold - 0.1)):
            common = round(600 * share / (1 + share))
            search = NearDuplicates(threshold)
            search.add(0, " ".join(words))
            other = [*words[: common + 4], *sentence(1000 + seed, 300 - common)]
            found[side] += search.add(1, " ".join(other)) is not None
    assert found["more"] >= 38
    assert found["less"] <= 2


def test_other_texts_are_not_near() -> None:
    search = NearDuplicates(0.8)
    texts = [" ".join(sentence(seed, 60)) for seed in range(50)]
    assert [search.add(i, text) for i, text in enumerate(texts)] == [None] * 50
    assert search.add(50, texts[17]) == 17


def test_the_first_of_several_near_rows_is_named() -> None:
    words = sentence(1, 444)
    search = NearDuplicates(0.5)
    assert search.add(4, " ".join(words[:304])) is None
    assert search.add(9, " ".join(words[140:])) is None  # they share 0.36
    assert search.add(10, " ".join(words[70:374])) == 4  # 0.62 with either


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Yes, of course", "yes of course!", True),
        ("Yes, of course", "Yes, of course not", False),
        ("one two three four", "two one three four", False),
        ("", " \n", True),
        ("!!!", "???", False),
        ("你好吗", "你好吗。", True),
        ("你好吗", "你好呀", False),
        ("\ud800", "\ud801", False),
    ],
)
def test_texts_shorter_than_a_shingle_are_compared_as_a_whole(first, second, same) -> None:
    search = NearDuplicates(0.8)
    search.add(0, first)
    assert (search.add(1, second) == 0) == same


def test_the_memory_is_said_before_it_is_taken() -> None:
    search = NearDuplicates(0.8)
    sentence_ = search.announce(10_000_000, free_bytes=64 * 2**30)
    assert sentence_ == "near-duplicate search over 10,000,000 rows will take about 29.0 GiB"
    assert search.announce(1000, 2**30).endswith("about 3.0 MiB")


def test_more_memory_than_is_free_is_refused_with_both_amounts() -> None:
    with pytest.raises(UserError, match=r"10,000,000 rows .* 29.0 GiB, and 16.0 GiB are free"):
        NearDuplicates(0.8).announce(10_000_000, free_bytes=16 * 2**30)


def test_the_memory_said_is_near_the_memory_taken() -> None:
    search, rows = NearDuplicates(0.8), 20_000
    search.add(-1, "the patterns are compiled at the first text")
    before = resident_bytes()
    for row in range(rows):
        search.add(row, " ".join(sentence(row, 20)))
    taken, said = resident_bytes() - before, search.estimate_bytes(rows)
    assert 0.4 * said < taken < 1.1 * said


def resident_bytes() -> int:
    psutil = pytest.importorskip("psutil")
    return psutil.Process().memory_info().rss


def test_without_its_library_the_search_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match=r"pip install 'llamaweft\[clean\]'"):
        NearDuplicates(0.8)
