"""The pack: the one form in which documents reach the model.

A pack is a flat run of T tokens, cut into S segments. A document attends to its own
segment and to that segment's ancestors: a shared prefix is a parent, and without sharing
every document is one segment without a parent. There is no padding and no T x T mask.

Labels are N triples (position, target, weight) instead of a label per token, because the
last position of a shared prefix has one target for each of its children, and positions
without a label cost no logits.

T: tokens of the pack   S: segments   N: labels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llamaweft.prefixes import numbered, prefix_tree, texts_within, unshared


class DocumentLike(Protocol):
    """What a pack is made of: token ids, and how much each token counts as a target. One with
    `labels` (position, target, weight) is for a head that reads it there; -1 is the last token. One
    with `second` above 0 is a pair of texts, of which the second begins at that token."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def weights(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Pack:
    """One micro-batch.

    ids_T, positions_T (int64): tokens and their positions within the document.
    segment_T (int64): the segment of each token; segments are contiguous and numbered in order.
    parent_S (int64): the parent of each segment, always an earlier one, or -1.
    label_position_N (int64): the index into T whose output predicts the target.
    label_target_N (int64; float32 for a head), label_weight_N (float32): the target and its weight.
    label_sequence_N (int64): the document that a label belongs to.
    document_tokens: tokens of the documents as they were given.
    """

    ids_T: Tensor
    positions_T: Tensor
    segment_T: Tensor
    parent_S: Tensor
    label_position_N: Tensor
    label_target_N: Tensor
    label_weight_N: Tensor
    label_sequence_N: Tensor
    document_tokens: int

    @classmethod
    def from_documents(cls, documents: Sequence[DocumentLike], *, share: bool = False) -> Pack:
        """A pack of documents; the first token of each has no context, so it is never a target.

        share: beginnings that documents have in common stand once (prefixes.py), and positions
        continue from them. Otherwise each document is one segment, and a pair of texts two.
        """
        texts = [texts_within(d.ids, getattr(d, "second", 0)) for d in documents]
        ids = [text for of in texts for text in of]
        tree = prefix_tree(ids) if share else unshared([len(i) for i in ids])
        sizes = [run.tokens for run in tree.runs]
        position, target, weight, sequence = [], [], [], []
        for index, (document, own) in enumerate(zip(documents, numbered(texts), strict=True)):
            places = np.concatenate([tree.places(text) for text in own])
            labels = getattr(document, "labels", None)
            if labels is not None:
                position.append(places[labels["position"]])
                target.append(labels["target"])
                weight.append(labels["weight"])
                sequence.append(np.full(len(labels), index))
                continue
            trained = np.flatnonzero(document.weights[1:]) + 1
            position.append(places[trained - 1])
            target.append(document.ids[trained])
            weight.append(document.weights[trained])
            sequence.append(np.full(len(trained), index))
        return cls(
            ids_T=_int64(np.concatenate([ids[r.document][r.start : r.stop] for r in tree.runs])),
            positions_T=_int64(np.concatenate([np.arange(r.start, r.stop) for r in tree.runs])),
            segment_T=_int64(np.repeat(np.arange(len(sizes)), sizes)),
            parent_S=torch.tensor([run.parent for run in tree.runs], dtype=torch.int64),
            label_position_N=_int64(np.concatenate(position)),
            label_target_N=_targets(np.concatenate(target)),
            label_weight_N=torch.from_numpy(np.concatenate(weight).astype(np.float32)),
            label_sequence_N=_int64(np.concatenate(sequence)),
            document_tokens=sum(len(i) for i in ids),
        )

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.ids_T)

    @property
    def trained_tokens(self) -> int:
        """Labels: tokens that the loss is taken on."""
        return len(self.label_target_N)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return torch.bincount(self.segment_T, minlength=len(self.parent_S)).tolist()

    @cached_property
    def parents(self) -> list[int]:
        return self.parent_S.tolist()

    def ancestors(self, segment: int) -> list[int]:
        """The segments that `segment` continues, the outermost first."""
        chain: list[int] = []
        while (segment := self.parents[segment]) >= 0:
            chain.insert(0, segment)
        return chain

    def weightless(self) -> Pack:
        """The same pack, whose labels count nothing."""
        return replace(self, label_weight_N=torch.zeros_like(self.label_weight_N))

    def to(self, device: torch.device) -> Pack:
        """The same pack on `device`."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            n: v.to(device) if isinstance(v, Tensor) else v for n, v in held.items()
        }
        return Pack(**moved)


def _targets(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values) if values.dtype == np.float32 else _int64(values)


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
