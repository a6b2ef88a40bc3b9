"""The pack that stands for all of a run when a layer is run for its time."""

from __future__ import annotations

from llamaweft.data.selection import squares_of
from llamaweft.model.pack import Pack
from llamaweft.pieces.pieces import Pieces
from llamaweft.plan.memory import MOST_LABELS


def mean_pack(pieces: Pieces, most_tokens: int) -> tuple[Pack, int, int]:
    """A pack of the run that is as large as the mean one, or its first `most_tokens`; the sum of
    L^2 over its documents; the labels of a mean pack, as many as the head sees at once."""
    loader = pieces.loader
    _, computed, labels = loader.epoch_tokens
    packs = loader.packs_per_epoch
    chosen = min(loader.first_packs, key=lambda pack: abs(pack.tokens - computed / packs))
    documents, left = [], most_tokens
    for index in chosen.documents:
        document = pieces.data.documents[index]
        if len(document.ids) > left and not document.second and document.labels is None:
            document = document.part(0, left)
        documents.append(document)
        left -= len(document.ids)
        if left < 2:
            break
    at_once = max(1, min(round(labels / packs), MOST_LABELS))
    return loader.collate(documents), int(squares_of(documents).sum()), at_once
