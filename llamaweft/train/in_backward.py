"""The optimizer in the backward pass: a parameter is updated as soon as its gradient is there, and
the gradient is freed at once, so that never all gradients are held.

With one micro-batch a step and no clipping the numbers are those of a step after the backward pass,
bit for bit. The idea is that of LOMO (Lv et al., 2023); the hooks are those of PyTorch's tutorial
"How to save memory by fusing the optimizer step into the backward pass".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class InBackward:
    """Hooks that step `optimizer`, one parameter at a time, at the rate that it has then.

    parameters: by name, in the order of a gradient norm. goes_on: whether the backward pass will
    add more to gradients that it has just added to; a parameter is updated with the last of them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, nn.Parameter],
        goes_on: Callable[[], bool],
    ) -> None:
        self.optimizer, self.goes_on = optimizer, goes_on
        self.parameters = list(parameters.values())
        self._groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        self._norms: dict[int, Tensor] = {}
        self.harmed = False
        """Whether a gradient of this step was not finite: the weights are no longer good."""
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter: Tensor) -> None:
        if self.goes_on():
            return
        assert parameter.grad is not None
        assert id(parameter) not in self._norms, "a parameter got a gradient after it was updated"
        norm = torch.linalg.vector_norm(parameter.grad)
        self._norms[id(parameter)] = norm
        self.harmed = self.harmed or not bool(norm.isfinite())
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [self._groups[id(parameter)] | {"params": [parameter]}]
        self.optimizer.step()
        self.optimizer.param_groups = groups
        parameter.grad = None

    def norm(self) -> float:
        """The norm of the whole gradient of the step, as torch's `clip_grad_norm_` computes it."""
        norms = [self._norms[id(p)] for p in self.parameters if id(p) in self._norms]
        self._norms.clear()
        self.harmed = False
        return float(torch.linalg.vector_norm(torch.stack(norms)))
