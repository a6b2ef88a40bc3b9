"""The pack contract: labels, positions, and that documents never see each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llamaweft.data.chat import Document
from llamaweft.data.targets import LABEL
from llamaweft.model.head_config import HeadConfig
from llamaweft.model.llama import with_head
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.model.task_heads import TaskHead


def document(ids: list[int], trained: list[int]) -> Document:
    return Document(np.array(ids, np.int32), np.array(trained, np.float32), "")


def test_labels_are_the_next_tokens_that_are_trained() -> None:
    pack = Pack.from_documents([document([5, 6, 7], [1, 0, 1]), document([8, 9], [0, 1])])
    assert pack.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert pack.segment_T.tolist() == [0, 0, 0, 1, 1]
    # The first token of a document has no context: its weight of 1 is no label.
    assert pack.label_position_N.tolist() == [1, 3]
    assert pack.label_target_N.tolist() == [7, 9]
    assert pack.label_sequence_N.tolist() == [0, 1]


def test_a_document_does_not_see_its_neighbours(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights=None)
    random = np.random.default_rng(0)
    first, second, other = (random.integers(0, 900, 40).tolist() for _ in range(3))
    ones = [1] * 40
    with torch.no_grad():
        a = model(Pack.from_documents([document(first, ones), document(second, ones)]))
        b = model(Pack.from_documents([document(other, ones), document(second, ones)]))
    assert torch.equal(a[40:], b[40:])
    assert not torch.equal(a[:40], b[:40])


def test_a_shared_beginning_stands_once_and_positions_go_on_from_it() -> None:
    start = list(range(100, 108))
    documents = [
        document([*start, 1, 2], [0] * 8 + [1, 1]),
        document([*start, 3], [0] * 8 + [1]),
        document([7, 8], [0, 1]),
    ]
    pack = Pack.from_documents(documents, share=True)
    assert (pack.tokens, pack.document_tokens) == (13, 21)
    # In sorted order: [7, 8] is a segment of its own, then the beginning and its two ends.
    assert pack.ids_T.tolist() == [7, 8, *start, 1, 2, 3]
    assert pack.positions_T.tolist() == [0, 1, *range(8), 8, 9, 8]
    assert pack.parent_S.tolist() == [-1, -1, 1, 1]
    assert pack.label_sequence_N.tolist() == [0, 0, 1, 2]
    assert pack.label_target_N.tolist() == [1, 2, 3, 8]
    assert pack.label_position_N.tolist() == [9, 10, 9, 0]  # two targets after the beginning


def pair(chosen: list[int], rejected: list[int]) -> Document:
    ids = np.array([*chosen, *rejected], np.int32)
    labels = np.array([(len(chosen) - 1, 1, 0.5), (len(ids) - 1, -1, 0.5)], LABEL)
    return Document(ids, np.zeros(len(ids), np.float32), "", labels, len(chosen))


def test_a_pair_is_two_texts_with_labels_of_one_document() -> None:
    start = list(range(100, 108))
    pairs = [pair([*start, 1, 2], [*start, 3]), pair([7, 8], [9])]
    pack = Pack.from_documents(pairs)
    assert pack.ids_T.tolist() == [*start, 1, 2, *start, 3, 7, 8, 9]
    assert pack.positions_T.tolist() == [*range(10), *range(9), 0, 1, 0]
    assert pack.parent_S.tolist() == [-1] * 4
    assert pack.label_position_N.tolist() == [9, 18, 20, 21]
    shared = Pack.from_documents(pairs, share=True)
    assert (shared.tokens, shared.document_tokens) == (14, 22)
    assert shared.ids_T.tolist() == [7, 8, 9, *start, 1, 2, 3]
    assert shared.positions_T.tolist() == [0, 1, 0, *range(10), 8]
    assert shared.parent_S.tolist() == [-1, -1, -1, 2, 2]
    assert shared.label_position_N.tolist() == [12, 13, 1, 2]
    for one in (pack, shared):
        assert one.label_target_N.tolist() == [1, -1, 1, -1]
        assert one.label_sequence_N.tolist() == [0, 0, 1, 1]


def test_the_texts_of_a_pair_do_not_see_each_other(tiny_folder: Path) -> None:
    """Without sharing, the chosen text's reward keeps its bits whatever the other says."""
    torch.manual_seed(0)
    causal = load_causal_lm(tiny_folder, base_weights=None)
    model = with_head(causal, TaskHead(HeadConfig("reward", ()), 64, causal.device)).eval()
    random = np.random.default_rng(0)
    first, second, other = (random.integers(0, 900, 40).tolist() for _ in range(3))
    ((read, _),) = model.read(Pack.from_documents([pair(first, second)]))
    ((again, _),) = model.read(Pack.from_documents([pair(first, other)]))
    assert torch.equal(read[0], again[0])
    assert not torch.equal(read[1], again[1])
    ((turned, _),) = model.read(Pack.from_documents([pair(second, first)]))
    torch.testing.assert_close(turned.flip(0), read, rtol=1e-5, atol=1e-6)


def levels(random: np.random.Generator) -> list[Document]:
    """Three levels of sharing, a document that others begin with, one twice and one apart; some
    tokens of the beginnings are trained, with weights."""
    system, first, second = (random.integers(0, 900, n).tolist() for n in (40, 24, 16))
    rows = [
        system + first + random.integers(0, 900, 12).tolist(),
        system + first + second + random.integers(0, 900, 1).tolist(),
        system + first + second + random.integers(0, 900, 9).tolist(),
        system + random.integers(0, 900, 30).tolist(),
        system + first,
        system + first,
        random.integers(0, 900, 50).tolist(),
    ]
    weights = [random.choice([0, 0.5, 1], len(ids)).tolist() for ids in rows]
    return [document(ids, weight) for ids, weight in zip(rows, weights, strict=True)]


def test_shared_beginnings_give_the_loss_and_gradients_of_separate_documents(
    tiny_folder: Path,
) -> None:
    documents = levels(np.random.default_rng(1))
    results = []
    for share in (True, False):
        pack = Pack.from_documents(documents, share=share)
        model = load_causal_lm(tiny_folder, base_weights=None)
        total, count = model.loss(pack)
        total.backward()
        results.append((total.detach(), count, [p.grad for p in model.parameters()]))
        assert pack.document_tokens == sum(len(d.ids) for d in documents)
    assert Pack.from_documents(documents, share=True).tokens < 250 < pack.tokens
    (loss_a, count_a, grads_a), (loss_b, count_b, grads_b) = results
    assert count_a == count_b
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-5, atol=0)
    for a, b in zip(grads_a, grads_b, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_sequence_losses_do_not_depend_on_sharing(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights=None)
    documents = levels(np.random.default_rng(2))
    together = model.sequence_losses(Pack.from_documents(documents, share=True))
    apart = model.sequence_losses(Pack.from_documents(documents))
    assert together == [pytest.approx(pair, rel=1e-5) for pair in apart]


def test_weights_scale_a_label(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights=None)
    pack = Pack.from_documents([document([5, 6, 7, 8], [0, 1, 1, 1])])
    heavy = replace(pack, label_weight_N=torch.tensor([2.0, 0.5, 0.0]))
    losses = model.lm_head.label_losses(model.hidden(pack), pack)
    total, count = model.loss(heavy)
    assert float(count) == 2.5
    torch.testing.assert_close(total, (losses * heavy.label_weight_N).sum())


def test_sequence_losses_are_those_of_each_document_alone(tiny_folder: Path) -> None:
    model = load_causal_lm(tiny_folder, base_weights=None)
    documents = [document([3, 4, 5], [0, 1, 1]), document([9, 8, 7, 6], [0, 0, 0, 1])]
    together = model.sequence_losses(Pack.from_documents(documents))
    alone = [model.sequence_losses(Pack.from_documents([d]))[0] for d in documents]
    assert together == [pytest.approx(pair, rel=1e-5) for pair in alone]
    assert [weight for _, weight in together] == [2, 1]
