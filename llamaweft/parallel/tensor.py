"""Matrices cut over several ranks that work on the same pack, with torch's DTensor.

Shoeybi et al. (2019): Megatron-LM. Queries, keys, values, gate and up are cut by output features,
what follows them by input features, so that a layer's attention and MLP are whole heads and whole
features of one rank, and their outputs are parts of a sum. Embedding and head are cut by rows of
the vocabulary. Everything happens by hooks around modules, whose code knows nothing of it.

T: tokens   E: hidden size   V: vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from llamaweft.errors import UserError
from llamaweft.parallel.ranks import Cuts

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")


@dataclass
class _Cutter:
    """Cuts the matrices of one model. mesh: of one dimension, the tensor ranks."""

    mesh: DeviceMesh
    dims: dict[str, int] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)

    @property
    def part(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def count(self) -> int:
        return self.mesh.size()

    @property
    def device(self) -> torch.device:
        return torch.device(self.mesh.device_type)

    def linear(self, name: str, module: Any, dim: int) -> None:
        """Cut a linear layer, or one with an adapter: by outputs (dim 0) or by inputs (dim 1)."""
        base = getattr(module, "base_layer", module)
        self.matrix(name, base, dim)
        if dim == 0:
            base.out_features //= self.count
            module.out_features = base.out_features
        else:
            base.in_features //= self.count
        if base is not module:
            cut, whole = ("lora_B", "lora_A") if dim == 0 else ("lora_A", "lora_B")
            held = getattr(module, cut)
            mine = held.detach().chunk(self.count, dim)[self.part].clone()
            setattr(module, cut, nn.Parameter(mine, requires_grad=held.requires_grad))
            self.dims[f"{name}.{cut}"] = dim
            self.partial.add(f"{name}.{whole}")

    def matrix(self, name: str, module: Any, dim: int) -> None:
        """Hold a part of a module's matrix: of a frozen one in its codec, of a trained one as a
        DTensor."""
        weight = module.weight
        try:
            if isinstance(weight, nn.Parameter):
                if weight.shape[dim] % self.count:
                    raise ValueError(f"{weight.shape[dim]} in {self.count} parts")
                mine = weight.detach().chunk(self.count, dim)[self.part]
                mine = mine.to(self.device, torch.float32, copy=True)
                spread = DTensor.from_local(mine, self.mesh, [Shard(dim)], run_check=False)
                module.hold(nn.Parameter(spread, requires_grad=weight.requires_grad))
            else:
                module.hold(weight.cut(dim, self.part, self.count).to(self.device))
        except ValueError as error:
            raise UserError(
                f"parallel.tensor: {self.count} cannot cut {name} ({error}); use fewer tensor "
                "ranks, or base_weights: bf16"
            ) from None


def cut(model: Any, mesh: DeviceMesh) -> Cuts:
    """Cut a causal model, or one with another head, over the ranks of `mesh`.

    Adapters are cut with their layers. Raises UserError where a matrix has not so many parts, and
    for adapters whose start or norm takes a whole matrix.
    """
    cutter = _Cutter(mesh)
    base = model.model
    for index, layer in enumerate(base.layers):
        for part, module in (("self_attn", layer.self_attn), ("mlp", layer.mlp)):
            for child, linear in list(module.named_children()):
                name = f"model.layers.{index}.{part}.{child}"
                cutter.linear(name, linear, 0 if child in BY_OUTPUTS else 1)
                if child in BY_INPUTS:
                    linear.register_forward_hook(_Joined(mesh), with_kwargs=True)
            module.register_forward_pre_hook(_Entered(mesh))
    _cut_vocabulary(model, base, cutter)
    return Cuts(cutter.dims, frozenset(cutter.partial))


def _cut_vocabulary(model: Any, base: Any, cutter: _Cutter) -> None:
    head, embedding = getattr(model, "lm_head", None), base.embed_tokens
    tied = head is not None and head.weight is embedding.weight
    rows = embedding.weight.shape[0]
    cutter.matrix("model.embed_tokens", embedding, 0)
    first = cutter.part * (rows // cutter.count)
    lookup = _Lookup(cutter.mesh, first, rows // cutter.count)
    embedding.register_forward_pre_hook(lookup.before)
    embedding.register_forward_hook(lookup.after)
    if head is None:
        return
    if tied:
        head.hold(embedding.weight)
    else:
        cutter.matrix("lm_head", head, 0)
    head.out_features = rows // cutter.count
    head.vocabulary = VocabularyPart(cutter.mesh, first, rows)
    head.register_forward_hook(_Gathered(cutter.mesh))


class _Entered:
    """Before a module that is cut: its input as it is; of its gradient the parts are summed."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TE = DTensor.from_local(args[0], self.mesh, [Replicate()], run_check=False)
        return x_TE.to_local(grad_placements=[Partial()]), *args[1:]


class _Joined:
    """After the last matrix of a module: the sum of what the ranks found. An output that nothing
    reads (model/replay.py gives one back in the second run) is left as it is."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y_TE: Tensor
    ) -> Tensor:
        if named.get("given") is not None:
            return y_TE
        parts = DTensor.from_local(y_TE, self.mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()


class _Gathered:
    """After the head: logits of the whole vocabulary, for generating."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y_TV: Tensor) -> Tensor:
        parts = DTensor.from_local(y_TV, self.mesh, [Shard(1)], run_check=False)
        return parts.full_tensor()


class _Lookup:
    """Around the embedding: each rank looks up the ids of its rows, and the others are added."""

    def __init__(self, mesh: DeviceMesh, first: int, rows: int) -> None:
        self.joined, self.first, self.rows = _Joined(mesh), first, rows

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        place_T = args[0] - self.first
        self.elsewhere_T = (place_T < 0) | (place_T >= self.rows)
        return place_T.masked_fill(self.elsewhere_T, 0), *args[1:]

    def after(self, module: nn.Module, args: tuple[Any, ...], x_TE: Tensor) -> Tensor:
        mine_TE = x_TE.masked_fill(self.elsewhere_T[:, None], 0)
        return self.joined(module, args, {}, mine_TE)


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of the vocabulary that this rank's head has (model/heads.py). first: of its rows.
    size: of the whole vocabulary."""

    mesh: DeviceMesh
    first: int
    size: int

    def highest(self, values: Tensor) -> Tensor:
        """The largest of what the ranks have, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.mesh.get_group())
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum of what the ranks have, in place."""
        dist.all_reduce(values, group=self.mesh.get_group())
        return values

    def local(self, target_C: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Of target ids: their places among this rank's rows, 0 where they are elsewhere; and
        whether they are here."""
        place_C = target_C - self.first
        here_C = (place_C >= 0) & (place_C < rows)
        return torch.where(here_C, place_C, 0), here_C
