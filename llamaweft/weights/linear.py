"""Matrix products with a trained or a frozen weight.

T: tokens   I: input features   O: output features
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y_TO = x_TI w_OI^T, computed in the dtype of x.

    `weight` is trained in fp32, or frozen in whatever dtype it is held in. A frozen weight gets
    no gradient, and a copy of it in the compute dtype lives only as long as the product.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x_TI: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return F.linear(x_TI, self.weight.to(x_TI.dtype))
        return _FrozenProduct.apply(x_TI, self.weight)

    def dequantised(self) -> Tensor:
        """w_OI in fp32: what a merge adds to."""
        return self.weight.detach().float()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _FrozenProduct(torch.autograd.Function):
    """x w^T that keeps nothing but a reference to w for its backward pass, g w."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor) -> Tensor:
        ctx.save_for_backward(w_OI)
        return F.linear(x_TI, w_OI.to(x_TI.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (w_OI,) = ctx.saved_tensors
        return grads[0] @ w_OI.to(grads[0].dtype), None
