"""Low-rank adapters: y = W x + s B A x, with A and B trained and W frozen.

Hu et al. (2021); rank-stabilised scale: Kalajdzievski (2023). Names, initialisation and files
are PEFT's, so the adapter folder opens with `peft.PeftModel`.

T: tokens   I: input features   O: output features   R: rank
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamaweft.errors import UserError
from llamaweft.weights.linear import Linear

LAYER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What `target_modules: all-linear` means: every linear layer but the head."""


@dataclass(frozen=True)
class LoraConfig:
    """What PEFT's LoraConfig calls by the same names."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = LAYER_LINEARS

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Module):
    """A frozen linear layer with its low-rank update. A starts random, B at zero, so the model
    starts as the base."""

    def __init__(self, base_layer: Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling, self.dropout = config.scaling, config.lora_dropout
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.r, base_layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, config.r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x_TI: Tensor) -> Tensor:
        a_RI, b_OR = self.lora_A.to(x_TI.dtype), self.lora_B.to(x_TI.dtype)
        seen_TI = F.dropout(x_TI, self.dropout, self.training) if self.dropout else x_TI
        low_TR = F.linear(seen_TI, a_RI) * self.scaling
        return self.base_layer(x_TI) + F.linear(low_TR, b_OR)

    def merged(self) -> Tensor:
        """w_OI + scaling * B A, in fp32."""
        return self.base_layer.dequantised() + self.scaling * (self.lora_B @ self.lora_A).detach()


def inject(model: nn.Module, config: LoraConfig) -> list[str]:
    """Replace the targeted linear layers of `model` by LoraLinear, freeze everything else, and
    return the names of the layers.

    Raises UserError when a target matches no layer.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    linears = {name: m for name, m in model.named_modules() if type(m) is Linear}
    for target in config.target_modules:
        if not any(_matches(name, target) for name in linears):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise UserError(
                f"adapter.target_modules: no linear layer is called {target!r}; there are {known}"
            )
    chosen = [n for n in linears if any(_matches(n, target) for target in config.target_modules)]
    for name in chosen:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoraLinear(linears[name], config))
    return chosen


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers of `model` by their names in the base model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
