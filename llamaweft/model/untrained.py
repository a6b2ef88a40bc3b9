"""Tokens that a model never learnt: base models hold rows for control tokens that no text had."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.model.folder import TensorFile, tensor_files
from llamaweft.model.stores import OWN
from llamaweft.weights.frozen import FrozenWeight
from llamaweft.weights.store import Store

EMBEDDING = "model.embed_tokens.weight"
SAMPLE = 256
"""Rows that tell how large a trained one is."""

SMALL = 0.02
"""An untrained row is smaller than this part of the usual one: it stands where weight decay took
it, or was never anything but zero."""


def untrained_tokens(folder: Path, candidates: Collection[int]) -> list[int]:
    """Those of `candidates` whose row of the embedding was never trained.

    Raises UserError for a folder that cannot be read.
    """
    embedding = _embedding(folder)
    vocab_size = embedding.shape[0]
    asked = sorted(token for token in candidates if 0 <= token < vocab_size)
    sample = list(range(0, vocab_size, max(1, vocab_size // SAMPLE)))
    norms = _rows(embedding, [*asked, *sample]).norm(dim=1)
    usual = norms[len(asked) :].median()
    return [token for token, norm in zip(asked, norms, strict=False) if norm < SMALL * usual]


def _embedding(folder: Path) -> FrozenWeight | TensorFile:
    if (own := folder / OWN).is_dir():
        return Store(own).matrix(EMBEDDING)
    found = next((tensor for tensor in tensor_files(folder) if tensor.name == EMBEDDING), None)
    if found is None:
        raise UserError(f"{folder} lacks the tensor {EMBEDDING}; download the model again")
    if len(found.shape) != 2:
        raise UserError(f"{found.path}: {EMBEDDING} is no matrix; download the model again")
    return found


def _rows(embedding: FrozenWeight | TensorFile, tokens: list[int]) -> Tensor:
    """Rows of the embedding, in fp32."""
    if isinstance(embedding, FrozenWeight):
        return embedding.gather(torch.tensor(tokens), torch.float32)
    with embedding.opened() as part:
        return torch.cat([part(token, token + 1).float() for token in tokens])
