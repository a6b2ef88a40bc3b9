"""Low-rank adapters: y = W x + s B A x, with A and B trained and W frozen.

Hu et al. (2021); rank-stabilised scale: Kalajdzievski (2023). Names, initialisation and files
are PEFT's, so the adapter folder opens with `peft.PeftModel`.

T: tokens   I: input features   O: output features   R: rank
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamaweft.adapters.dora import DoraProduct, factors, row_norms
from llamaweft.adapters.pissa import PissaProduct, check_rank, difference, principal
from llamaweft.errors import UserError
from llamaweft.weights.frozen import FrozenWeight
from llamaweft.weights.linear import Linear
from llamaweft.weights.matmul import add_thin_product, product, summed_over_tokens

LAYER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What `target_modules: all-linear` means: every linear layer but the head."""


@dataclass(frozen=True)
class LoraConfig:
    """What PEFT's LoraConfig calls by the same names; init_lora_weights: default, pissa or
    pissa_niter_N. modules_to_save: names in the causal model; who builds it trains them."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = LAYER_LINEARS
    use_dora: bool = False
    init_lora_weights: str = "default"
    modules_to_save: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def is_pissa(self) -> bool:
        return self.init_lora_weights != "default"

    @property
    def saved(self) -> LoraConfig:
        """What an adapter folder says: of PiSSA a plain adapter of twice the rank, whose
        lora_alpha grows so that the scaling stays."""
        if not self.is_pissa:
            return self
        growth = math.sqrt(2) if self.use_rslora else 2
        alpha = growth * self.lora_alpha
        return replace(self, r=2 * self.r, lora_alpha=alpha, init_lora_weights="default")


class LoraLinear(nn.Module):
    """A frozen linear layer with its low-rank update. A starts random, B at zero, so the model
    starts as the base."""

    gradient_needs_output = False

    def __init__(self, base_layer: Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features = base_layer.out_features
        self.scaling, self.dropout = config.scaling, config.lora_dropout
        device = base_layer.weight.device
        # Drawn on the CPU: the same start on every device.
        a_RI = nn.init.kaiming_uniform_(torch.empty(config.r, base_layer.in_features), math.sqrt(5))
        self.lora_A = nn.Parameter(a_RI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, config.r, device=device))

    def forward(self, x_TI: Tensor, given: Tensor | None = None) -> Tensor:
        drops = self.dropout > 0 and self.training
        seen_TI = F.dropout(x_TI, self.dropout) if drops else None
        weight = self.base_layer.weight
        assert isinstance(weight, FrozenWeight)
        return _LoraProduct.apply(
            x_TI, seen_TI, self.lora_A, self.lora_B, weight, self.scaling, (given,)
        )

    def merged(self) -> Tensor:
        """w_OI + scaling * B A, in fp32."""
        return self.merged_rows(self.base_layer.dequantised(), slice(None))

    def merged_rows(self, base_NI: Tensor, rows: slice) -> Tensor:
        """Rows of `merged`, in new memory, from those of the base."""
        return base_NI + self.scaling * (self.lora_B[rows] @ self.lora_A).detach().float()


class DoraLinear(LoraLinear):
    """A frozen linear layer with its weight-decomposed update (adapters/dora.py).

    The magnitudes start as the norms of the base's rows, so the model starts as the base. The
    norms are computed again when A or B changed, by their version counters: what writes to them
    past autograd, as fused optimizers do, must raise these (train/optim.py).
    """

    gradient_needs_output = True

    def __init__(self, base_layer: Linear, config: LoraConfig) -> None:
        super().__init__(base_layer, config)
        assert isinstance(base_layer.weight, FrozenWeight)
        self.base_squares_O = base_layer.weight.row_squares()
        self.lora_magnitude_vector = nn.Parameter(self.base_squares_O.sqrt().float())
        self._norm: tuple[tuple[int, int], Tensor] | None = None

    def norm(self) -> Tensor:
        """The norms of the rows of W + s B A, fp32."""
        versions = self.lora_A._version, self.lora_B._version
        if self._norm is None or self._norm[0] != versions:
            weight = self.base_layer.weight
            assert isinstance(weight, FrozenWeight)
            with torch.inference_mode(False), torch.no_grad():  # it outlives an evaluation
                norm_O = row_norms(
                    self.base_squares_O, weight, self.lora_A, self.lora_B, self.scaling
                )
            self._norm = versions, norm_O
        return self._norm[1]

    def forward(self, x_TI: Tensor, given: Tensor | None = None) -> Tensor:
        weight, magnitude_O = self.base_layer.weight, self.lora_magnitude_vector
        return DoraProduct.apply(
            x_TI, self.lora_A, self.lora_B, magnitude_O, weight, self.scaling, self.norm(), (given,)
        )

    def merged_rows(self, base_NI: Tensor, rows: slice) -> Tensor:
        """Rows of m / n * (w_OI + scaling * B A)."""
        factor_N = factors(self.lora_magnitude_vector[rows], self.norm()[rows])
        return super().merged_rows(base_NI, rows) * factor_N[:, None]

    def take_norms(self) -> None:
        """Take the norms of the base's rows anew, once another base is held."""
        assert isinstance(self.base_layer.weight, FrozenWeight)
        self.base_squares_O, self._norm = self.base_layer.weight.row_squares(), None


class PissaLinear(LoraLinear):
    """A frozen linear layer with the update of its principal part (adapters/pissa.py).

    initial_A, initial_B: where A and B started. Until `start` or `unstack` fills them they are
    zeros, and the layer is a plain LoraLinear.
    """

    initial_A: Tensor
    initial_B: Tensor

    def __init__(self, base_layer: Linear, config: LoraConfig) -> None:
        super().__init__(base_layer, config)
        assert not config.lora_dropout
        self.register_buffer("initial_A", torch.zeros_like(self.lora_A))
        self.register_buffer("initial_B", torch.zeros_like(self.lora_B))

    @torch.no_grad()
    def start(self, init_lora_weights: str) -> None:
        """Put A and B to the principal part of W, as `init_lora_weights` says."""
        w_OI, rank = self.base_layer.dequantised(), len(self.lora_A)
        a_RI, b_OR = principal(w_OI, rank, init_lora_weights, self.scaling)
        self._fill(a_RI, b_OR, a_RI, b_OR)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """[A; A0] and [B, -B0]: the same update as a plain adapter, as PEFT converts it."""
        a_SI = torch.cat([self.lora_A.detach(), self.initial_A])
        return a_SI, torch.cat([self.lora_B.detach(), -self.initial_B], dim=1)

    @torch.no_grad()
    def unstack(self, a_SI: Tensor, b_OS: Tensor) -> None:
        """Take back what `stacked` gave."""
        rank = len(self.lora_A)
        self._fill(a_SI[:rank], b_OS[:, :rank], a_SI[rank:], -b_OS[:, rank:])

    def _fill(self, a_RI: Tensor, b_OR: Tensor, initial_a: Tensor, initial_b: Tensor) -> None:
        self.lora_A.copy_(a_RI)
        self.lora_B.copy_(b_OR)
        self.initial_A.copy_(initial_a)
        self.initial_B.copy_(initial_b)

    def forward(self, x_TI: Tensor, given: Tensor | None = None) -> Tensor:
        initial, weight = (self.initial_A, self.initial_B), self.base_layer.weight
        return PissaProduct.apply(
            x_TI, self.lora_A, self.lora_B, *initial, weight, self.scaling, (given,)
        )

    def merged_rows(self, base_NI: Tensor, rows: slice) -> Tensor:
        """Rows of w_OI + scaling * (B A - B0 A0)."""
        a_SI, b_OS = difference(self.lora_A, self.lora_B, self.initial_A, self.initial_B)
        return base_NI + self.scaling * (b_OS[rows] @ a_SI)


class _LoraProduct(torch.autograd.Function):
    """y = x w^T + s (seen A^T) B^T, where `seen` is x after dropout (None: x itself).

    With low = s seen A^T:  dB = g^T low,  dlow = s g B,  dA = dlow^T seen,  dseen = dlow A,
    dx = g w. The low-rank parts are added to the products in place, so no second output is made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        seen_TI: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        weight: FrozenWeight,
        scaling: float,
        given: tuple[Tensor | None],
    ) -> Tensor:
        ctx.weight, ctx.scaling = weight, scaling
        a_RI, b_OR = lora_a.to(x_TI.dtype), lora_b.to(x_TI.dtype)
        low_TR = product(x_TI if seen_TI is None else seen_TI, a_RI.t()).mul_(scaling)
        ctx.save_for_backward(x_TI, seen_TI, lora_a, lora_b, low_TR)
        if given[0] is not None:
            return given[0]
        return add_thin_product(weight.linear(x_TI), low_TR, b_OR.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, seen_TI, lora_a, lora_b, low_TR = ctx.saved_tensors
        g_TO = grads[0]
        wants_x, wants_seen = ctx.needs_input_grad[:2]
        a_RI, b_OR = lora_a.to(g_TO.dtype), lora_b.to(g_TO.dtype)
        g_low_TR = product(g_TO, b_OR).mul_(ctx.scaling)
        g_b = summed_over_tokens(g_TO, low_TR).to(lora_b.dtype)
        g_a = summed_over_tokens(g_low_TR, x_TI if seen_TI is None else seen_TI).to(lora_a.dtype)
        g_x = ctx.weight.linear_backward(g_TO) if wants_x else None
        g_seen = g_low_TR @ a_RI if wants_seen else None
        if seen_TI is None and g_x is not None:
            add_thin_product(g_x, g_low_TR, a_RI)
        return g_x, g_seen, g_a, g_b, None, None, None


def inject(model: nn.Module, config: LoraConfig) -> list[str]:
    """Replace the targeted linear layers of `model` by LoraLinear or a relative, freeze everything
    else, and return the names of the layers. PissaLinear is yet to be started or filled.

    Raises UserError when a target matches no layer, or is too small for PiSSA's rank.
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
    if config.is_pissa and chosen:
        check_rank(config.r, {n: (linears[n].out_features, linears[n].in_features) for n in chosen})
    kind = DoraLinear if config.use_dora else PissaLinear if config.is_pissa else LoraLinear
    for name in chosen:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, kind(linears[name], config))
    return chosen


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def loraplus_ratios(parameters: Iterable[str], ratio: float) -> dict[str, float]:
    """The trained parameters whose learning rate is `ratio` times that of lora_A, by name: LoRA+
    (Hayou et al., 2024). Magnitudes learn as lora_B does, as in peft's
    create_loraplus_optimizer."""
    faster = (".lora_B", ".lora_magnitude_vector")
    return {name: ratio for name in parameters if name.endswith(faster)}


def start_pissa(model: nn.Module, config: LoraConfig, say: Callable[[str], None]) -> None:
    """Start every PissaLinear of `model` from its matrix, one after the other."""
    layers = [layer for layer in lora_layers(model).values() if isinstance(layer, PissaLinear)]
    say(f"taking the singular values of {len(layers)} matrices ({config.init_lora_weights})")
    for layer in layers:
        layer.start(config.init_lora_weights)


def constants(model: nn.Module) -> dict[str, Tensor]:
    """What adapters hold beside what is trained, and would not find again: where PiSSA started."""
    return {
        f"{name}.{half}": getattr(layer, half)
        for name, layer in lora_layers(model).items()
        if isinstance(layer, PissaLinear)
        for half in ("initial_A", "initial_B")
    }


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers of `model` by their names in the base model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
