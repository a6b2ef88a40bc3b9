"""The tree of prefixes: every document is the path to its last run, and nothing stands twice."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llamaweft.prefixes import BLOCK_TOKENS, prefix_tree, unshared

DOCUMENTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=1, max_size=30)


def as_ids(documents: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids, np.int32) for ids in documents]


@given(DOCUMENTS)
def test_paths_spell_the_documents(documents: list[list[int]]) -> None:
    tree = prefix_tree(as_ids(documents))
    for index, ids in enumerate(documents):
        spelt: list[int] = []
        for place in tree.path(index):
            run = tree.runs[place]
            assert run.start == len(spelt)
            assert run.parent < place
            spelt += documents[run.document][run.start : run.stop]
        assert spelt == ids


@given(DOCUMENTS)
def test_whole_blocks_in_common_stand_once(documents: list[list[int]]) -> None:
    """Counted apart: each beginning of n blocks is computed once, the rest once a document."""
    size = BLOCK_TOKENS
    unique = {tuple(ids) for ids in documents}
    blocks = {ids[: n * size] for ids in unique for n in range(1, len(ids) // size + 1)}
    expected = size * len(blocks) + sum(len(ids) % size for ids in unique)
    assert prefix_tree(as_ids(documents)).tokens == expected


def test_many_levels_need_no_deep_recursion() -> None:
    ids = [np.arange(8 * n) for n in range(1, 3000)]
    tree = prefix_tree(ids)
    assert tree.tokens == 8 * 2999
    assert len(tree.path(2998)) == 2999


def test_without_sharing_each_document_is_a_run() -> None:
    tree = unshared([3, 5])
    assert [(run.start, run.stop, run.parent) for run in tree.runs] == [(0, 3, -1), (0, 5, -1)]
