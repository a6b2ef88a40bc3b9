"""A frozen matrix of the vocabulary in which the rows of new tokens are trained.

The frozen matrix stays as it is, mapped and in its codec; the rows of the new tokens are a small
parameter in fp32 beside it. They may take the place of spare rows of the matrix, or follow it.

T: tokens   V: vocabulary   N: new tokens   E: hidden size
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamaweft.weights.frozen import FrozenWeight

ROWS = "trainable_tokens_delta"
"""PEFT's name of the rows, though they replace rows and are added to none (its
tuners/trainable_tokens)."""


class GrownWeight:
    """w_VE: `base`, with `new_NE` in the place of its rows from `first` on, and after its last."""

    def __init__(self, base: FrozenWeight, first: int, new_NE: nn.Parameter) -> None:
        self.base, self.new_NE = base, new_NE
        self.span = slice(first, first + len(new_NE))

    @property
    def shape(self) -> torch.Size:
        rows, columns = self.base.shape
        return torch.Size((max(rows, self.span.stop), columns))

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def of_base(self) -> Iterator[slice]:
        """The rows that are the base's, before and after the new ones."""
        yield slice(0, self.span.start)
        if self.span.stop < self.base.shape[0]:
            yield slice(self.span.stop, self.base.shape[0])

    def gather(self, ids_T: Tensor, dtype: torch.dtype) -> Tensor:
        """x_TE, the rows of token ids, with a gradient for those of new tokens."""
        is_new_T = (ids_T >= self.span.start) & (ids_T < self.span.stop)
        known_TE = self.base.gather(ids_T.masked_fill(is_new_T, 0), dtype)
        places = is_new_T.nonzero().squeeze(1)
        new = F.embedding(ids_T[places] - self.span.start, self.new_NE)
        return known_TE.index_copy(0, places, new.to(dtype))

    def joined(self, of_base: Tensor, of_new: Tensor, dim: int) -> Tensor:
        """What was made of the base's rows and of the new ones, in the order of the vocabulary."""
        before, *after = (of_base.narrow(dim, r.start, r.stop - r.start) for r in self.of_base)
        return torch.cat([before, of_new, *after], dim)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w_VE, whole: a copy, detached."""
        return self.joined(self.base.dequantised(dtype), self.new_NE.detach().to(dtype), 0)


def row_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The rows of new tokens, by the name of the module that holds them; one entry where embedding
    and head share them."""
    return {
        name: rows
        for name, module in model.named_modules()
        if (rows := module._parameters.get(ROWS)) is not None
    }
