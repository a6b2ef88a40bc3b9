"""AdamW over the trained parameters, its state as named tensors, and fp16's gradient scaler.

Parameters are fp32 masters, updated in place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from llamaweft.errors import UserError
from llamaweft.parallel.ranks import ALONE, Ranks, mesh_names

ADAMW, ADAMW_8BIT = "adamw", "adamw_8bit"
"""The values of `training.optimizer`."""

RATIO = "lr_ratio"
"""What a group of parameters multiplies the learning rate by."""

_BLOCK = 256
"""Elements of an 8-bit moment that share one fp32 scale, bitsandbytes' `absmax`."""

LIKE_THE_WEIGHTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""Moments with a number for each weight."""

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
    rate_ratios: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2019). Matrices decay, vectors do not.

    rate_ratios: how many times the learning rate a parameter learns with, by its name; 1 where it
    is not named. Each step raises the version counters of the parameters, which fused kernels
    leave as they are: what is computed from parameters and held (adapters/lora.py) goes by them.

    adamw: moments in fp32, torch's fused kernel. adamw_8bit: moments in 8 bit, each block with a
    scale of its own (Dettmers et al., 2022), bitsandbytes' kernel.
    """
    alike: dict[tuple[bool, float, tuple[str, ...]], list[nn.Parameter]] = defaultdict(list)
    for key, parameter in parameters.items():
        ratio = (rate_ratios or {}).get(key, 1.0)
        alike[parameter.ndim < 2, ratio, mesh_names(parameter)].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": alike[kind], "weight_decay": 0.0 if kind[0] else weight_decay, RATIO: kind[1]}
        for kind in sorted(alike)  # matrices first
    ]
    optimizer: torch.optim.Optimizer
    if name == ADAMW_8BIT:
        from bitsandbytes.optim import AdamW8bit  # optional, and slow to import

        optimizer = AdamW8bit(groups, betas=betas, eps=eps)
    else:
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    optimizer.register_step_post_hook(_raise_versions)
    return optimizer


def _raise_versions(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Of the parameters that were stepped; others may be in the midst of a backward pass."""
    increment_version([p for group in optimizer.param_groups for p in group["params"]])


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """`rate`, times the ratio of each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATIO, 1.0)


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


def empty_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    found: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Give the optimizer the state that `optimizer_state` found, but for the numbers of moments
    that have as many as their parameter: those are zeros, and returned by name, to be filled."""
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in found.items():
        name, _, moment = key.rpartition(":")
        states[name][moment] = value
    maps = states.pop("", {})
    to_fill = {}
    for name, moments in states.items():
        parameter = parameters[name]
        state: dict[str, Any] = {}
        for moment, value in (moments | maps).items():
            if moment in LIKE_THE_WEIGHTS:
                state[moment] = torch.zeros_like(parameter, dtype=value.dtype)
                to_fill[f"{name}:{moment}"] = state[moment]
            else:
                one = value.dtype == torch.int64
                state[moment] = value.item() if one else value.to(parameter.device)
        optimizer.state[parameter] = state
    return to_fill


def build_scaler(
    device: torch.device, compute_dtype: torch.dtype, ranks: Ranks = ALONE
) -> torch.amp.GradScaler:
    """Multiplies the loss, so that small gradients do not vanish in fp16, and divides them again
    before they are used (Micikevicius et al., 2018). Disabled for every other dtype. Of several
    ranks all leave a step out where one overflowed."""
    if ranks.in_step and compute_dtype == torch.float16:
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        return ShardedGradScaler(device.type)
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
