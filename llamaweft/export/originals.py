"""Merging into the base model's own numbers, where training held them in a codec.

A run on nf4 or int8 trains on rounded weights, and its adapter learns to live with the rounding. A
merge into the rounded weights answers like the model that was trained; a merge into the original
ones has none of the rounding left, as peft has it that opens the base in 16 bits. The originals are
mapped from the files of the model folder: they take no memory of their own.
"""

from __future__ import annotations

from pathlib import Path

from llamaweft.adapters.lora import DoraLinear
from llamaweft.errors import UserError
from llamaweft.model.folder import TensorFile, checked_tensors, read_config
from llamaweft.model.llama import LlamaForCausalLM, Model, empty_causal_lm
from llamaweft.model.stores import own_codec
from llamaweft.weights.codecs import PLAIN
from llamaweft.weights.frozen import FrozenWeight, Scratch
from llamaweft.weights.grown import GrownWeight
from llamaweft.weights.linear import Embedding, Linear
from llamaweft.weights.stream import Resident

AUTO, ORIGINAL, DEQUANTISED = "auto", "original", "dequantised"
MERGES = (AUTO, ORIGINAL, DEQUANTISED)
"""What `--merge-into` says."""

_DTYPES = {"fp32": "F32", "bf16": "BF16"}
"""What a file holds where a plain codec holds the same numbers."""


def merge_base(asked: str, folder: Path, codec: str, trains_all: bool) -> str | None:
    """What an adapter is merged into: original or dequantised; None where nothing is frozen.

    folder: of the base model. codec: in which training held it. Raises UserError where there is
    nothing to merge into, or no originals.
    """
    if asked not in MERGES:
        raise UserError(f"--merge-into {asked}: give one of {', '.join(MERGES)}")
    if trains_all:
        if asked != AUTO:
            raise UserError(
                f"--merge-into {asked}: this run trained every weight, so there is nothing to "
                "merge into; leave the option out"
            )
        return None
    stored = own_codec(folder)
    if asked == AUTO:
        return ORIGINAL if stored is None else DEQUANTISED
    if asked == ORIGINAL and stored is not None:
        raise UserError(
            f"--merge-into original: {folder} holds its weights in {stored} and nothing else; "
            "leave the option out, or give a run whose model folder has safetensors"
        )
    return asked


def originals(folder: Path) -> dict[str, TensorFile]:
    """The base model's own tensors by their names in a causal model, checked and unread."""
    config = read_config(folder)
    return {t.name: t for t in checked_tensors(folder, empty_causal_lm(config), config)}


def holds_originals(tensors: dict[str, TensorFile], codec: str) -> bool:
    """Whether a model in this codec holds the very numbers of the files."""
    if codec == "fp32":  # every 16-bit number is one in fp32
        return True
    dtypes = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1}
    return codec in PLAIN and dtypes == {_DTYPES[codec]}


def hold_originals(model: Model, tensors: dict[str, TensorFile]) -> None:
    """Put the base model's own numbers in the place of the frozen matrices that `model` holds, on
    the CPU. What is trained stays; DoRA's norms become those of the new sums, so that its
    magnitudes mean what they mean to peft on the same base."""
    model.cpu()
    model.model.stream = Resident()
    scratch = Scratch()  # one for all: each keeps what its largest rows took
    for name, module in model.named_modules():
        if isinstance(module, Linear | Embedding) and name != "lm_head":
            _hold(module, name, tensors, scratch)
    if isinstance(model, LlamaForCausalLM):
        if model.config.tie_word_embeddings:
            model.tie_weights()
        else:
            _hold(model.lm_head, "lm_head", tensors, scratch)
    for module in model.modules():
        if isinstance(module, DoraLinear):
            module.take_norms()


def _hold(
    module: Linear | Embedding, name: str, tensors: dict[str, TensorFile], scratch: Scratch
) -> None:
    weight = module.weight
    if isinstance(weight, GrownWeight):
        base = _mapped(tensors[_in_files(name)], scratch)
        module.hold_grown(GrownWeight(base, weight.span.start, weight.new_NE))
    elif isinstance(weight, FrozenWeight):
        module.hold(_mapped(tensors[_in_files(name)], scratch))


def _in_files(name: str) -> str:
    """The name of a module's matrix in the base model's files."""
    causal = name.removesuffix(".base_layer").replace("transformer.", "model.", 1)
    return f"{causal}.weight"


def _mapped(tensor: TensorFile, scratch: Scratch) -> FrozenWeight:
    """A matrix as it is in its file. Both plain codecs read whatever dtype they hold."""
    values = tensor.mapped()
    codec = "fp32" if tensor.dtype == "F32" else "bf16"
    return FrozenWeight(codec, tensor.shape, {"values": values}, scratch=scratch)
