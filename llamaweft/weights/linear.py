"""Linear layers and embeddings whose matrix is trained, or frozen in a codec.

A product may be `given` its output: when a layer is run again for its backward pass, a product
whose output was kept (model/replay.py) hands it on instead of multiplying, and its gradient is
that of the product.

T: tokens   I: input features   O: output features   V: vocabulary   E: hidden size
N: new tokens
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamaweft.weights.frozen import FrozenWeight
from llamaweft.weights.grown import ROWS, GrownWeight
from llamaweft.weights.matmul import product, summed_over_tokens


def local(weight: Any) -> Any:
    """A weight itself, or of one that is cut over several processes (a DTensor) the part that is
    here, with its gradient."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


class _Held(nn.Module):
    """A module whose `weight` is a trained parameter, a FrozenWeight, or one grown by trained rows
    of new tokens."""

    weight: nn.Parameter | FrozenWeight | GrownWeight

    def hold(self, weight: nn.Parameter | FrozenWeight | GrownWeight) -> None:
        """Put another weight in the place of the present one."""
        if "weight" in self._parameters:
            del self.weight
        else:
            self.__dict__.pop("weight", None)
        self.weight = weight

    def hold_grown(self, weight: GrownWeight) -> None:
        """Put a grown weight in the place of the present one, its new rows as a parameter."""
        self.hold(weight)
        self.register_parameter(ROWS, weight.new_NE)

    def dequantised(self) -> Tensor:
        """The matrix in fp32, detached."""
        if isinstance(self.weight, FrozenWeight | GrownWeight):
            return self.weight.dequantised()
        return self.weight.detach().float()


class Linear(_Held):
    """y_TO = x_TI w_OI^T, computed in the dtype of x.

    A trained weight is an fp32 parameter. A frozen one gets no gradient and is decoded tile by
    tile, so that no copy of it is ever whole.
    """

    gradient_needs_output = False
    """Whether its gradient is computed from its output (model/replay.py)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x_TI: Tensor, given: Tensor | None = None) -> Tensor:
        if isinstance(self.weight, FrozenWeight):
            return _FrozenProduct.apply(x_TI, self.weight, (given,))
        if isinstance(self.weight, GrownWeight):  # a head's, whose output is never kept
            known_TO = _FrozenProduct.apply(x_TI, self.weight.base, (None,))
            new_TN = F.linear(x_TI, self.weight.new_NE.to(x_TI.dtype))
            return self.weight.joined(known_TO, new_TN, 1)
        return _TrainedProduct.apply(x_TI, local(self.weight), (given,))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Embedding(_Held):
    """Rows of w_VE by token id."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))

    def forward(self, ids_T: Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(self.weight, FrozenWeight | GrownWeight):
            return self.weight.gather(ids_T, dtype)
        return F.embedding(ids_T, local(self.weight)).to(dtype)


class _FrozenProduct(torch.autograd.Function):
    """x w^T that keeps only a reference to w for its backward pass, g w."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight: FrozenWeight, given: tuple[Tensor | None]
    ) -> Tensor:
        ctx.weight = weight
        return weight.linear(x_TI) if given[0] is None else given[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        wanted = ctx.needs_input_grad[0]
        return ctx.weight.linear_backward(grads[0]) if wanted else None, None, None


class _TrainedProduct(torch.autograd.Function):
    """x w^T with an fp32 master w, multiplied in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor, given: tuple[Tensor | None]) -> Tensor:
        ctx.save_for_backward(x_TI, w_OI)
        return product(x_TI, w_OI.to(x_TI.dtype).t()) if given[0] is None else given[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TI, w_OI = ctx.saved_tensors
        g_TO = grads[0]
        wants_input, wants_weight, _ = ctx.needs_input_grad
        g_TI = product(g_TO, w_OI.to(g_TO.dtype)) if wants_input else None
        g_OI = summed_over_tokens(g_TO, x_TI).to(w_OI.dtype) if wants_weight else None
        return g_TI, g_OI, None
