"""AdamW over the trained parameters, its state as named tensors, and fp16's gradient scaler.

Parameters are fp32 masters, updated in place.
"""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from llamaweft.errors import UserError

ADAMW, ADAMW_8BIT = "adamw", "adamw_8bit"
"""The values of `training.optimizer`."""

_BLOCK = 256
"""Elements of an 8-bit moment that share one fp32 scale, bitsandbytes' `absmax`."""

_MAPS = ("qmap1", "qmap2")
"""What the 256 values of an 8-bit moment mean: one table for all parameters."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_bytes_per_parameter(name: str) -> float:
    """Bytes of the two moments of a number that is trained.

    adamw_8bit keeps a tensor of less than 4096 elements as adamw does.
    """
    moment = {ADAMW: 4.0, ADAMW_8BIT: 1 + 4 / _BLOCK}
    return 2 * moment[name]


def check_optimizer_installed(name: str) -> None:
    """Raises UserError when the optimizer's package is missing."""
    if name == ADAMW_8BIT and find_spec("bitsandbytes") is None:
        raise UserError(
            f"training.optimizer: {name} needs bitsandbytes, which is not installed; "
            f"`pip install bitsandbytes`, or use {ADAMW}"
        )


def build_optimizer(
    name: str,
    parameters: dict[str, nn.Parameter],
    *,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2019). Matrices decay, vectors do not.

    adamw: moments in fp32, torch's fused kernel. adamw_8bit: moments in 8 bit, each block with a
    scale of its own (Dettmers et al., 2022), bitsandbytes' kernel.
    """
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == ADAMW_8BIT:
        from bitsandbytes.optim import AdamW8bit  # optional, and slow to import

        return AdamW8bit(groups, betas=betas, eps=eps)
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """What the optimizer keeps, as `parameter:moment` tensors, and as `:moment` what all share.

    A Python number is a tensor of int64. Empty before the first step.
    """
    return {
        f"{'' if moment in _MAPS else name}:{moment}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    state: dict[str, Tensor],
) -> None:
    """Put back what `optimizer_state` gave."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        name, _, moment = key.rpartition(":")
        found[name][moment] = value
    maps = found.pop("", {})
    for name, moments in found.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            moment: value.item() if value.dtype == torch.int64 else value.to(parameter.device)
            for moment, value in (moments | maps).items()
        }


def build_scaler(device: torch.device, compute_dtype: torch.dtype) -> torch.amp.GradScaler:
    """Multiplies the loss, so that small gradients do not vanish in fp16, and divides them again
    before they are used (Micikevicius et al., 2018). Disabled for every other dtype."""
    return torch.amp.GradScaler(device.type, enabled=compute_dtype == torch.float16)


def scaler_state(scaler: torch.amp.GradScaler) -> tuple[float | None, int]:
    """The loss scale and the steps taken since it changed; (None, 0) of a disabled scaler."""
    state = scaler.state_dict()
    return state.get("scale"), state.get("_growth_tracker", 0)


def load_scaler_state(
    scaler: torch.amp.GradScaler, loss_scale: float | None, steps_at_loss_scale: int
) -> None:
    """Put back what `scaler_state` gave."""
    if loss_scale is not None:
        state = {"scale": loss_scale, "_growth_tracker": steps_at_loss_scale}
        scaler.load_state_dict(scaler.state_dict() | state)
