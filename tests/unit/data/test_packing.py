"""Packing and the stream of steps: complete, deterministic, resumable anywhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llamaweft.data.chat import Document
from llamaweft.data.loader import Loader
from llamaweft.data.packing import pack_epoch


@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=200),
    capacity=st.integers(20, 120),
    seed=st.integers(0, 5),
)
def test_every_document_is_packed_once_and_packs_are_not_overfull(lengths, capacity, seed) -> None:
    sizes = np.array(lengths)
    packs = pack_epoch(sizes, np.ones(len(sizes)), capacity, seed, 0)
    assert sorted(d for pack in packs for d in pack) == list(range(len(sizes)))
    for pack in packs:
        assert sizes[pack].sum() <= capacity or len(pack) == 1
    assert packs == pack_epoch(sizes, np.ones(len(sizes)), capacity, seed, 0)


def test_packs_are_nearly_full() -> None:
    sizes = np.random.default_rng(0).integers(20, 300, 4000)
    packs = pack_epoch(sizes, np.ones(4000), 1024, 0, 0)
    assert sizes.sum() / (len(packs) * 1024) > 0.98


def test_epochs_and_seeds_differ_and_order_does_not_follow_length() -> None:
    sizes = np.random.default_rng(0).integers(20, 300, 600)
    ones = np.ones(600)
    first = pack_epoch(sizes, ones, 1024, 0, 0)
    assert first != pack_epoch(sizes, ones, 1024, 0, 1)
    assert first != pack_epoch(sizes, ones, 1024, 1, 0)
    longest = [sizes[pack].max() for pack in first]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.3


def test_weights_are_how_often_a_document_is_seen() -> None:
    sizes = np.full(1000, 10)
    weights = np.concatenate([np.full(500, 2.0), np.full(500, 0.5)])
    times = Counter(d for pack in pack_epoch(sizes, weights, 100, 0, 0) for d in pack)
    assert all(times[d] == 2 for d in range(500))
    assert 200 < sum(times[d] for d in range(500, 1000)) < 300


def test_at_least_one_document_is_seen() -> None:
    assert len(pack_epoch(np.full(3, 10), np.full(3, 1e-9), 100, 0, 0)) == 1


def loader(accumulation: int = 3, **length) -> Loader[list[int]]:
    documents = [
        Document(np.arange(n, dtype=np.int32), np.ones(n, np.float32), str(n), str(n))
        for n in range(5, 60)
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
