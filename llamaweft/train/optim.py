"""AdamW over the trained parameters, and its state as named tensors.

Parameters are fp32 masters; torch's fused kernel updates them in place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def build_adamw(
    parameters: dict[str, nn.Parameter],
    *,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019). Matrices decay, vectors do not."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The moments as `parameter:moment` tensors; empty before the first step."""
    return {
        f"{name}:{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    state: dict[str, Tensor],
) -> None:
    """Put back what `optimizer_state` gave."""
    for name, parameter in parameters.items():
        moments = {m: state[f"{name}:{m}"] for m in _MOMENTS if f"{name}:{m}" in state}
        if moments:
            device = parameter.device
            optimizer.state[parameter] = {m: t.to(device) for m, t in moments.items()}
