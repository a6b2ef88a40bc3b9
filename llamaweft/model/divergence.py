"""How far a model has moved from what it was: KL divergence of its next tokens, and its loss.

KL(p || q) = sum_v p_v (log p_v - log q_v) in nats, with p the model as it was, q as it is now, over
the whole vocabulary. With logits z = W h and their log-sum-exp L it is

    sum_v p_v (z_v - z'_v) - L + L'

so it needs running sums only: both logits are made tile by tile from hidden states, and never held
whole. Tokens that the model did not have then have p = 0 and count in L' alone.

N: labels   C: labels of one tile   E: hidden size   V: vocabulary (of a tile, with C)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.model.heads import TILE_LABELS, VOCABULARY_TILE, Weight
from llamaweft.model.llama import LlamaForCausalLM
from llamaweft.model.pack import Pack
from llamaweft.weights.frozen import FrozenWeight, tile_size
from llamaweft.weights.grown import GrownWeight

Head = Weight | Tensor
"""A head's matrix, or a copy of it."""

Rows = Callable[[int, int], Tensor]
HIDDEN = "hidden_NE"


@dataclass(frozen=True)
class Compared:
    """Sums over the labels of one document, in nats. before, after: its loss."""

    kl: float
    before: float
    after: float
    labels: int


class Reference:
    """A model as it is now, at the labels of some packs, to compare its later weights with.

    It keeps N x E hidden states in the compute dtype, and the head: the frozen matrix itself, or a
    copy where it is trained. hidden_NE: what such a reference kept before (`save`), for a model
    that began elsewhere. new: rows of the vocabulary that the model is only now given.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        packs: Sequence[Pack],
        *,
        new: range = range(0),
        hidden_NE: Tensor | None = None,
    ) -> None:
        self.packs, self.new = packs, new
        self.head = kept_head(model)
        with torch.no_grad():
            if hidden_NE is None:
                hidden_NE = torch.cat([_label_hidden(model, pack) for pack in packs])
        self.hidden_NE = hidden_NE.to(model.device)

    @torch.no_grad()
    def compare(self, model: LlamaForCausalLM) -> list[Compared]:
        """The model now, on each document of the packs, in their order."""
        found: list[Compared] = []
        first = 0
        for pack in self.packs:
            then_NE = self.hidden_NE[first : first + pack.trained_tokens]
            first += pack.trained_tokens
            now_NE = _label_hidden(model, pack)
            target_N = pack.label_target_N.to(model.device)
            then, now = (then_NE, self.head), (now_NE, model.lm_head.weight)
            columns = divergence(then, now, target_N, self.new)
            found += _by_document(pack, [column_N.cpu() for column_N in columns])
        return found

    def save(self, path: Path) -> None:
        """Write the hidden states: complete or absent."""
        aside = path.with_name(f".{path.name}.tmp")
        save_file({HIDDEN: self.hidden_NE.cpu().contiguous()}, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)


def read_hidden(path: Path, packs: Sequence[Pack], hidden_size: int) -> Tensor:
    """What `Reference.save` wrote. Raises UserError when it is missing, damaged, or of other
    packs."""
    shape = (sum(pack.trained_tokens for pack in packs), hidden_size)
    try:
        hidden_NE = load_file(path)[HIDDEN]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{path} holds what the model said when this run began, and cannot be read ({error}); "
            "start a new run in another output_dir"
        ) from None
    if hidden_NE.shape != shape:
        raise UserError(
            f"{path} is of other prompts: its shape is {tuple(hidden_NE.shape)} and not {shape}; "
            "start a new run in another output_dir"
        )
    return hidden_NE


def kept_head(model: LlamaForCausalLM) -> Head:
    """The head's matrix as it is now: itself where it is frozen, a copy where it is trained."""
    weight = model.lm_head.weight
    if isinstance(weight, GrownWeight):
        return weight.base
    if isinstance(weight, FrozenWeight) or not weight.requires_grad:
        return weight
    return weight.detach().clone()


@torch.no_grad()
def divergence(
    then: tuple[Tensor, Head], now: tuple[Tensor, Head], target_N: Tensor, new: range = range(0)
) -> tuple[Tensor, Tensor, Tensor]:
    """kl_N, and the loss of the targets then and now: loss_N, loss_N. In nats, fp64.

    then, now: (hidden_NE, w_VE). Products are made in fp32 of what each model multiplies with.
    new: rows of the head that `then` lacks; no target is one of them.
    """
    (then_NE, then_head), (now_NE, now_head) = then, now
    old, tuned = _LogSum(target_N), _LogSum(target_N)
    gap_N = torch.zeros(len(target_N), dtype=torch.float64, device=target_N.device)
    for first, w_now, w_then in _pairs(then_head, now_head, new, now_NE.dtype):
        for start in range(0, len(target_N), TILE_LABELS):
            at = slice(start, start + TILE_LABELS)
            now_VC = w_now @ now_NE[at].float().t()
            tuned.add(at, first, now_VC)
            if w_then is not None:
                then_VC = w_then @ then_NE[at].float().t()
                share_VC, shrunk_C = old.add(at, first, then_VC)
                gained_C = share_VC.mul_(then_VC.sub_(now_VC)).sum(0, dtype=torch.float64)
                gap_N[at] = gap_N[at] * shrunk_C + gained_C
    kl_N = gap_N / old.sum_N - old.log_sum() + tuned.log_sum()
    return kl_N.clamp_min(0), old.loss(), tuned.loss()  # it is never below 0 but by rounding


class _LogSum:
    """log sum_v exp(z_v) of logits that come in tiles of the vocabulary, and the target's logit."""

    def __init__(self, target_N: Tensor) -> None:
        self.target_N = target_N
        self.most_N = torch.full(target_N.shape, -torch.inf, device=target_N.device)
        self.sum_N = torch.zeros_like(self.most_N, dtype=torch.float64)
        self.of_target_N = self.most_N.double()

    def add(self, at: slice, first: int, z_VC: Tensor) -> tuple[Tensor, Tensor]:
        """exp(z - most) of the tile, and what sums of earlier tiles are to be multiplied by."""
        most_C = torch.maximum(self.most_N[at], z_VC.amax(dim=0))
        shrunk_C = (self.most_N[at] - most_C).double().exp()
        share_VC = (z_VC - most_C).exp_()
        self.sum_N[at] = self.sum_N[at] * shrunk_C + share_VC.sum(0, dtype=torch.float64)
        self.most_N[at] = most_C
        place_C = self.target_N[at] - first
        inside_C = (place_C >= 0) & (place_C < len(z_VC))
        z_C = z_VC.gather(0, place_C.clamp(0, len(z_VC) - 1)[None])[0].double()
        self.of_target_N[at] = torch.where(inside_C, z_C, self.of_target_N[at])
        return share_VC, shrunk_C

    def log_sum(self) -> Tensor:
        """Of each label, in fp64."""
        return self.sum_N.log() + self.most_N

    def loss(self) -> Tensor:
        return self.log_sum() - self.of_target_N


def _pairs(
    then: Head, now: Head, new: range, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(first row, rows_VE now, the same rows then, or None where they were not there) in fp32,
    valid until the next: what each head multiplies `dtype` with."""
    of_now = _reader(now, dtype)
    same = then is now or (isinstance(now, GrownWeight) and then is now.base)
    of_then = of_now if same else _reader(then, dtype)
    on_cpu = now.device.type == "cpu"
    size = 2 * tile_size(now.shape[1], dtype) if on_cpu else VOCABULARY_TILE
    edges = sorted({0, *((new.start, new.stop) if len(new) else ()), now.shape[0]})
    for begin, end in pairwise(edges):
        for first in range(begin, end, size):
            stop = min(first + size, end)
            if first in new:
                yield first, of_now(first, stop).float(), None
            elif same:
                rows_VE = of_now(first, stop).float()
                yield first, rows_VE, rows_VE
            else:
                yield first, of_now(first, stop).float(), of_then(first, stop).float()


def _reader(head: Head, dtype: torch.dtype) -> Rows:
    """Rows [start, stop) of a head in `dtype`."""
    if isinstance(head, GrownWeight):
        of_base, span, new_NE = _reader(head.base, dtype), head.span, head.new_NE.detach()

        def grown(start: int, stop: int) -> Tensor:
            if span.start <= start < span.stop:
                return new_NE[start - span.start : stop - span.start].to(dtype)
            return of_base(start, stop)

        return grown
    if isinstance(head, FrozenWeight):
        if head.device.type == "cpu":
            return lambda start, stop: head.rows(start, stop, dtype)
        whole_VE = head.dequantised(dtype)
        return lambda start, stop: whole_VE[start:stop]
    held_VE = head.detach()
    return lambda start, stop: held_VE[start:stop].to(dtype)


def _label_hidden(model: LlamaForCausalLM, pack: Pack) -> Tensor:
    """h_NE at each label of a pack."""
    pack = pack.to(model.device)
    return model.hidden(pack)[pack.label_position_N]


def _by_document(pack: Pack, columns: Sequence[Tensor]) -> list[Compared]:
    kl, before, after = (torch.bincount(pack.label_sequence_N, c).tolist() for c in columns)
    labels = torch.bincount(pack.label_sequence_N).tolist()
    return [Compared(*row) for row in zip(kl, before, after, labels, strict=True)]
