"""Packing and the stream of steps: complete, deterministic, resumable anywhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaweft.data.chat import Document
from llamaweft.data.loader import Loader
from llamaweft.data.packing import GROUP_TOKENS, Bin, epoch_windows, pack_window
from llamaweft.prefixes import PrefixTree, prefix_tree, unshared


def pack_epoch(
    tree: PrefixTree, weights, capacity: int, seed: int, epoch: int, group_tokens: int = 0
) -> list[Bin]:
    """All packs of an epoch that is one window."""
    (window,) = epoch_windows(weights, seed, epoch)
    random = np.random.default_rng([seed, epoch, 0])
    return pack_window(tree, window.tolist(), capacity, random, group_tokens)


def packed(lengths, weights, capacity: int, seed: int, epoch: int) -> list[list[int]]:
    """The documents of each pack, where nothing is shared."""
    return [
        pack.documents for pack in pack_epoch(unshared(lengths), weights, capacity, seed, epoch)
    ]


@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=200),
    capacity=st.integers(20, 120),
    seed=st.integers(0, 5),
)
def test_every_document_is_packed_once_and_packs_are_not_overfull(lengths, capacity, seed) -> None:
    sizes = np.array(lengths)
    packs = packed(sizes, np.ones(len(sizes)), capacity, seed, 0)
    assert sorted(d for pack in packs for d in pack) == list(range(len(sizes)))
    for pack in packs:
        assert sizes[pack].sum() <= capacity or len(pack) == 1
    assert packs == packed(sizes, np.ones(len(sizes)), capacity, seed, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["uniform", "short and long", "lognormal"])
def test_packs_are_at_least_98_percent_full(kind: str, seed: int) -> None:
    """A window of 1,000 rows of mixed lengths, in the mean a sixth of a pack. (Rows that are all
    alike fill it as they may: six of 160 tokens are 94% of 1,024 however they are packed.)"""
    random = np.random.default_rng(seed)
    lengths = {
        "uniform": random.integers(20, 321, 1000),
        "short and long": np.where(random.random(1000) < 0.92, 85, 935),
        "lognormal": random.lognormal(4.5, 1.1, 1000).clip(1, 1024).astype(int),
    }[kind]
    packs = packed(lengths, np.ones(1000), 1024, seed, 0)
    assert lengths.sum() / (len(packs) * 1024) >= 0.98


def test_epochs_and_seeds_differ_and_order_does_not_follow_length() -> None:
    sizes = np.random.default_rng(0).integers(20, 300, 600)
    ones = np.ones(600)
    first = packed(sizes, ones, 1024, 0, 0)
    assert first != packed(sizes, ones, 1024, 0, 1)
    assert first != packed(sizes, ones, 1024, 1, 0)
    longest = [sizes[pack].max() for pack in first]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.3


def test_weights_are_how_often_a_document_is_seen() -> None:
    sizes = np.full(1000, 10)
    weights = np.concatenate([np.full(500, 2.0), np.full(500, 0.5)])
    times = Counter(d for pack in packed(sizes, weights, 100, 0, 0) for d in pack)
    assert all(times[d] == 2 for d in range(500))
    assert 200 < sum(times[d] for d in range(500, 1000)) < 300


def test_at_least_one_document_is_seen() -> None:
    assert len(packed(np.full(3, 10), np.full(3, 1e-9), 100, 0, 0)) == 1


@given(
    endings=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=60),
    capacity=st.integers(30, 200),
    seed=st.integers(0, 3),
    group_tokens=st.sampled_from([0, 20, 64]),
)
def test_packs_count_what_they_compute_and_are_not_overfull(
    endings, capacity, seed, group_tokens
) -> None:
    random = np.random.default_rng(seed)
    starts = [random.integers(0, 9, n) for n in (0, 16, 40)]
    starts[2][:16] = starts[1]
    ids = [np.concatenate([starts[s], random.integers(0, 9, n)]) for s, n in endings]
    packs = pack_epoch(prefix_tree(ids), np.ones(len(ids)), capacity, seed, 0, group_tokens)
    assert sorted(d for pack in packs for d in pack.documents) == list(range(len(ids)))
    for pack in packs:
        assert pack.tokens == prefix_tree([ids[d] for d in pack.documents]).tokens
        assert pack.tokens <= capacity or len({ids[d].tobytes() for d in pack.documents}) == 1


@given(
    endings=st.lists(
        st.tuples(*[st.integers(0, 2), st.integers(1, 40)] * 2), min_size=1, max_size=40
    ),
    capacity=st.integers(60, 300),
)
def test_packs_of_pairs_count_what_they_compute(endings, capacity) -> None:
    """Pairs with one beginning, with two, and with none in common, some texts twice."""
    random = np.random.default_rng(1)
    starts = [random.integers(0, 9, n) for n in (0, 16, 40)]
    starts[2][:16] = starts[1]
    tails = random.integers(0, 9, 40)
    ids = [
        np.concatenate([starts[place], tails[:count]])
        for ending in endings
        for place, count in (ending[:2], ending[2:])
    ]
    texts = [(2 * index, 2 * index + 1) for index in range(len(endings))]
    packs = pack_epoch(prefix_tree(ids).of_documents(texts), np.ones(len(endings)), capacity, 0, 0)
    assert sorted(d for pack in packs for d in pack.documents) == list(range(len(endings)))
    for pack in packs:
        of_pack = [ids[text] for index in pack.documents for text in texts[index]]
        assert pack.tokens == prefix_tree(of_pack).tokens
        assert pack.tokens <= capacity or len({t.tobytes() for t in of_pack}) <= 2


def test_pairs_of_one_prompt_share_packs() -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 900, 200) for _ in range(20)]
    ids = [np.concatenate([prompts[i // 2 % 20], random.integers(0, 900, 20)]) for i in range(200)]
    texts = [(2 * index, 2 * index + 1) for index in range(100)]
    packs = pack_epoch(prefix_tree(ids).of_documents(texts), np.ones(100), 1024, 0, 0)
    # Five pairs on one prompt are 400 tokens, so two prompts share a pack of 1,024.
    assert [pack.tokens for pack in packs] == [800] * 10
    assert all(len({d % 20 for d in pack.documents}) == 2 for pack in packs)


@pytest.mark.parametrize("group_tokens", [0, GROUP_TOKENS])
def test_documents_that_begin_alike_share_packs(group_tokens: int) -> None:
    random = np.random.default_rng(0)
    contexts = [random.integers(0, 900, 200) for _ in range(20)]
    ids = [np.concatenate([contexts[i % 20], random.integers(0, 900, 20)]) for i in range(200)]
    packs = pack_epoch(prefix_tree(ids), np.ones(200), 1024, 0, 0, group_tokens)
    # Ten questions on one context are 400 tokens, so two contexts share a pack of 1,024.
    assert len(packs) == 10
    assert all(len({d % 20 for d in pack.documents}) == 2 for pack in packs)


def beginnings_of(group_tokens: int) -> list[int]:
    """How many of ten phrases the packs begin with: 400 sentences under one system message."""
    random = np.random.default_rng(0)
    system = random.integers(0, 900, 24)
    phrases = [random.integers(0, 900, 16) for _ in range(10)]
    ids = [
        np.concatenate([system, phrases[i % 10], random.integers(0, 900, 20)]) for i in range(400)
    ]
    packs = pack_epoch(prefix_tree(ids), np.ones(400), 384, 0, 0, group_tokens)
    # What all begin with is paid for once: (384 - 24) / 36 sentences at least.
    assert all(len(pack.documents) >= 10 for pack in packs)
    return [len({d % 10 for d in pack.documents}) for pack in packs]


def test_a_phrase_brings_no_rows_together_for_training() -> None:
    assert max(beginnings_of(0)) <= 2
    # Ten drawn at random are of 6.5 kinds in the mean.
    assert np.mean(beginnings_of(GROUP_TOKENS)) > 6


def test_the_loader_brings_no_rows_together_for_a_phrase() -> None:
    random = np.random.default_rng(0)
    phrases = [random.integers(0, 900, 16) for _ in range(10)]
    documents = []
    for index in range(400):
        ids = np.concatenate([phrases[index % 10], random.integers(0, 900, 20)])
        documents.append(Document(ids.astype(np.int32), np.ones(36, np.float32), str(index)))
    loader = Loader(documents, list, micro_batch_tokens=360, accumulation=1, share=True)
    kinds = [len({int(d.where) % 10 for d in pack}) for step in loader.steps() for pack in step]
    assert np.mean(kinds) > 6


def test_copies_in_one_epoch_are_not_drawn_together() -> None:
    tree = prefix_tree([np.arange(n * 100, n * 100 + 50) for n in range(8)])
    for pack in pack_epoch(tree, np.full(8, 3.0), 200, 0, 0):
        assert len(set(pack.documents)) == len(pack.documents)


def loader(accumulation: int = 3, **length) -> Loader[list[int]]:
    documents = [
        Document(np.arange(n, dtype=np.int32), np.ones(n, np.float32), str(n)) for n in range(5, 60)
    ]
    return Loader(
        documents,
        lambda pack: [len(d.ids) for d in pack],
        micro_batch_tokens=64,
        accumulation=accumulation,
        **length,
    )


def test_an_epoch_is_every_document_once() -> None:
    seen = [n for step in loader(epochs=1).steps() for pack in step for n in pack]
    assert sorted(seen) == list(range(5, 60))


def test_the_stream_goes_on_from_any_step() -> None:
    whole = list(loader(epochs=2.5).steps())
    assert len(whole) == loader(epochs=2.5).total_steps
    for start in (1, 7, len(whole) - 1):
        assert list(loader(epochs=2.5).steps(start)) == whole[start:]


def test_ranks_share_each_step_out() -> None:
    whole = list(loader(epochs=2.5).steps())
    for ranks in (2, 3, 5):  # five ranks for three packs: two have nothing to do
        shares = [list(loader(epochs=2.5).steps(0, rank, ranks)) for rank in range(ranks)]
        for step, *parts in zip(whole, *shares, strict=True):
            assert [parts[i % ranks][i // ranks] for i in range(len(step))] == step
            assert sum(map(len, parts)) == len(step)


def small_windows(monkeypatch) -> None:
    """As if millions of rows stood before windows of thousands."""
    for room in ("packing", "loader"):
        monkeypatch.setattr(f"llamaweft.data.{room}.WINDOW_DOCUMENTS", 16)
    monkeypatch.setattr("llamaweft.data.packing.BLOCK_DOCUMENTS", 4)


def test_many_documents_are_packed_window_by_window(monkeypatch) -> None:
    small_windows(monkeypatch)
    windows = epoch_windows(np.ones(55), 0, 0)
    assert len(windows) == 4
    assert sorted(np.concatenate(windows).tolist()) == list(range(55))
    # Neighbours of a file stay together: only where a window ends is one of the 14 blocks cut.
    assert sum(len(np.unique(window // 4)) for window in windows) <= 14 + 3
    assert [w.tolist() for w in windows] != [w.tolist() for w in epoch_windows(np.ones(55), 0, 1)]


@pytest.mark.parametrize("share", [False, True])
def test_windows_go_on_from_any_step(monkeypatch, share) -> None:
    small_windows(monkeypatch)
    whole = list(loader(epochs=2.5, share=share).steps())
    assert len(whole) == loader(epochs=2.5, share=share).total_steps
    for start in (1, 7, len(whole) - 1):
        assert list(loader(epochs=2.5, share=share).steps(start)) == whole[start:]
    seen = [n for step in loader(epochs=1, share=share).steps() for pack in step for n in pack]
    assert sorted(seen) == list(range(5, 60))


def test_max_steps_alone_decides_the_length() -> None:
    steps = list(loader(epochs=1, max_steps=40).steps())
    assert len(steps) == 40
    assert all(len(step) == 3 for step in steps)
    packs_per_epoch = loader().packs_per_epoch
    assert packs_per_epoch < 40 * 3  # epochs repeat
    assert steps[0] != steps[packs_per_epoch // 3]


def test_the_last_step_takes_what_is_left() -> None:
    packs = loader().packs_per_epoch
    assert packs % 5
    assert len(list(loader(accumulation=5).steps())[-1]) == packs % 5
