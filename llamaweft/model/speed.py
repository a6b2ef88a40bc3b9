"""How long one layer and the head take on this device, forward and backward: by running them.

The layer is a real one with random weights, on a pack of the run's own documents: products with
their decoding, attention, the adapter, elementwise work, fresh memory and calls are all in it.

T: tokens of the pack   E: hidden size   N: labels   V: vocabulary
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn

from llamaweft.model.heads import CausalLMHead
from llamaweft.model.llama import LlamaForCausalLM, Memory, empty_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.model.presets import LlamaConfig
from llamaweft.weights.codecs import codec_of
from llamaweft.weights.frozen import Scratch, random_frozen
from llamaweft.weights.linear import Linear

LEAST_SECONDS, LEAST_RUNS, MOST_RUNS = 0.4, 2, 20
"""A layer is run for at least so long and so often, and no more often."""

DEPTH, SHORT_SECONDS = 4, 0.2
"""A layer that takes no longer is run so often before its backward passes, as in a step: memory
that one of them is done with the next one uses, and is not taken anew."""

HEAD_ROWS = 16384
"""Rows of the head that stand for all of it."""


@dataclass(frozen=True)
class LayerSeconds:
    """Forward and backward pass of one layer in the middle of a model, and of its head.

    tokens: of the pack; squares: the sum of L^2 over its documents of L tokens. kept: where all is
    kept that may be; recomputed: where nothing is. label: of the head, for each label.
    """

    tokens: int
    squares: int
    kept: float
    recomputed: float
    label: float


def layer_seconds(
    config: LlamaConfig,
    pack: Pack,
    squares: int,
    labels: int,
    *,
    codec: str | None,
    compute_dtype: torch.dtype,
    device: torch.device,
    adapt: Callable[[LlamaForCausalLM], None],
    keepable: Collection[str],
    mlp_tile_tokens: int,
    predicts_tokens: bool,
) -> LayerSeconds:
    """Measure, for about a second where the model is small.

    codec: of the frozen weights, or None where they are trained. adapt: puts the adapter into a
    model of one layer. squares: the sum of L^2 over the pack's documents. labels: for which the
    head is run at once. predicts_tokens: whether the head is the vocabulary's.
    """
    small = replace(config, num_hidden_layers=1, vocab_size=8, tie_word_embeddings=False)
    model = _one_layer(small, codec, device)
    model.model.compute_dtype = compute_dtype
    adapt(model)
    model.to(device).train()
    pack = pack.to(device)
    x_TE = torch.randn(pack.tokens, config.hidden_size, device=device).to(compute_dtype)
    seconds = []
    for keep in (frozenset(keepable), frozenset[str]()):
        model.model.memory = Memory([keep], mlp_tile_tokens, 1)
        once = _median_seconds(lambda: _run(model, x_TE, pack, 1), device)
        if once <= SHORT_SECONDS:
            once = _median_seconds(lambda: _run(model, x_TE, pack, DEPTH), device) / DEPTH
        seconds.append(once)
    head = _head_seconds(config, labels, codec, compute_dtype, device) if predicts_tokens else 0.0
    return LayerSeconds(pack.tokens, squares, seconds[0], max(seconds), head)


def _one_layer(config: LlamaConfig, codec: str | None, device: torch.device) -> LlamaForCausalLM:
    """A model of one layer with random weights, in a codec or as parameters."""
    model, scratch = empty_causal_lm(config), Scratch()
    for name, parameter in list(model.named_parameters()):
        module = model.get_submodule(name.rpartition(".")[0])
        std = config.initializer_range
        if isinstance(module, Linear) and codec is not None:
            own, (rows, columns) = codec_of(name, codec, parameter.ndim), parameter.shape
            module.hold(random_frozen(own, (rows, columns), std, scratch).to(device))
        else:
            value = torch.empty(parameter.shape).normal_(0, std)
            module.weight = nn.Parameter(value.to(device), requires_grad=codec is None)
    return model


def _run(model: LlamaForCausalLM, x_TE: Tensor, pack: Pack, depth: int) -> None:
    y_TE = x_TE.detach().requires_grad_()
    for _ in range(depth):
        y_TE = model.model.first_layer(y_TE, pack)
    y_TE.backward(torch.ones_like(y_TE))
    model.zero_grad(set_to_none=True)


def _head_seconds(
    config: LlamaConfig,
    labels: int,
    codec: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Seconds for a label, from a part of the vocabulary."""
    rows = min(config.vocab_size, HEAD_ROWS)
    head = CausalLMHead(config.hidden_size, rows).to(device)
    # Small, as real logits are: the exponentials of large ones would be too small for fast numbers.
    shape, std = (rows, config.hidden_size), config.initializer_range
    if codec is None:
        head.hold(nn.Parameter(torch.empty(shape).normal_(0, std).to(device)))
    else:
        own = codec_of("lm_head.weight", codec, 2)
        head.hold(random_frozen(own, shape, std, Scratch()).to(device))
    hidden_NE = torch.randn(labels, config.hidden_size, device=device).to(dtype)
    targets_N = torch.randint(rows, (labels,), device=device)
    pack = Pack(
        ids_T=targets_N,
        positions_T=targets_N,
        segment_T=torch.zeros_like(targets_N),
        parent_S=torch.full((1,), -1),
        label_position_N=targets_N,
        label_target_N=targets_N,
        label_weight_N=torch.ones(labels, device=device),
        label_sequence_N=torch.zeros_like(targets_N),
        document_tokens=labels,
    )

    def run() -> None:
        total, _ = head.loss(hidden_NE.detach().requires_grad_(), pack, labels)
        total.backward()
        head.zero_grad(set_to_none=True)

    return _median_seconds(run, device) * config.vocab_size / rows / labels


def _median_seconds(run: Callable[[], None], device: torch.device) -> float:
    """After a first run, which compiles and warms up."""
    run()
    taken: list[float] = []
    while len(taken) < LEAST_RUNS or (sum(taken) < LEAST_SECONDS and len(taken) < MOST_RUNS):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return median(taken)
