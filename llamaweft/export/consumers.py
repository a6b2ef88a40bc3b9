"""An export opened by transformers or peft, on the CPU.

P: positions that are compared   V: vocabulary   C: outputs of a head   T: tokens
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.export.parity import Answers, compared_positions
from llamaweft.model.head_config import HeadConfig
from llamaweft.model.presets import LlamaConfig, parameter_count
from llamaweft.runtime import DTYPES
from llamaweft.weights.build import rows_at_once
from llamaweft.weights.codecs import codec_of, decode
from llamaweft.weights.frozen import encode

BESIDE_BYTES = 2**29
"""What a consumer takes beside the weights: activations, rows of logits, the libraries."""


SMALL_BYTES = 2**27
"""What bf16 must spare for the proof to be held to what training took."""


def consumer_dtype(
    config: LlamaConfig, written: str, free_bytes: int, budget_bytes: int | None
) -> str:
    """What the consumer computes in: fp32, or bf16 where the export is written in it and fp32 would
    take more than the budget, or than there is.

    written: dtype of the export. budget_bytes: what training took; a model so small that bf16
    spares nothing to speak of is not held to it. Raises UserError where there is not enough memory.
    """
    numbers = parameter_count(config)
    needed = {name: numbers * DTYPES[name].itemsize + BESIDE_BYTES for name in DTYPES}
    spared = needed["fp32"] - needed["bf16"]
    if spared < SMALL_BYTES or budget_bytes is None:
        budget_bytes = free_bytes
    if needed["fp32"] <= min(free_bytes, budget_bytes):
        return "fp32"
    if needed[written] <= free_bytes:
        return written
    raise UserError(
        "the proof opens the export in transformers, which needs "
        f"{needed[written] / 2**30:.1f} GiB of memory, and {free_bytes / 2**30:.1f} GiB are free; "
        "give --no-verify, or export on a machine with more memory"
    )


def in_transformers(folder: Path, kind: str, dtype: str, prompts: Sequence[np.ndarray]) -> Answers:
    """What a merged folder says. kind: the class that opens it. dtype: in which it computes."""
    model = _opened(folder, kind, dtype, None)
    return _answers(model, f"transformers.{kind}", dtype, prompts)


def in_peft(
    folder: Path,
    base: str,
    kind: str,
    codec: str,
    config: LlamaConfig,
    head: HeadConfig | None,
    dtype: str,
    prompts: Sequence[np.ndarray],
) -> Answers:
    """What an adapter folder says, opened by peft on its base model, held in `codec` as training
    held it. config, head: of the trained model.

    Raises UserError when peft is not installed.
    """
    check_peft()
    from peft import PeftModel

    model = _opened(base, kind, dtype, head)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # held as the live model holds it: matrices rounded, norms not
            parameter.data = _as_held(codec_of(name, codec, parameter.ndim), parameter.data)
    if model.config.vocab_size != config.vocab_size:  # as peft's AutoPeftModel does
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        consumer = PeftModel.from_pretrained(model, folder)
    return _answers(consumer, "peft.PeftModel", dtype, prompts)


def _as_held(codec: str, values: Tensor) -> Tensor:
    """What is left of a matrix in a codec, as new memory: the old may be a file's own pages."""
    held = torch.empty_like(values)
    rows = len(values) if codec == "nf4" else rows_at_once(values.shape)  # nf4: scales of scales
    for into, part in zip(held.split(rows), values.split(rows), strict=True):
        into.copy_(decode(codec, encode(codec, part), torch.float32))
    return held


def check_peft() -> None:
    """Raises UserError when peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError(
            "peft is not installed, so the adapter cannot be proven; pip install peft, or export "
            "with --no-verify"
        ) from None


def _opened(folder: Path | str, kind: str, dtype: str, head: HeadConfig | None) -> Any:
    """The model in transformers, without a progress bar. head: of a base that has none yet, which
    an adapter then fills."""
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    more = {}
    if head is not None and head.name == "score":
        more["num_labels"] = head.outputs
    try:
        opened = getattr(transformers, kind).from_pretrained(folder, dtype=DTYPES[dtype], **more)
    finally:
        if shown:
            logging.enable_progress_bar()
    return opened.eval()


@torch.inference_mode()
def _answers(model: Any, name: str, dtype: str, prompts: Sequence[np.ndarray]) -> Answers:
    model.eval()
    logits = [_logits(model, torch.from_numpy(ids.astype(np.int64))) for ids in prompts]
    return Answers(name, logits, dtype, pad=model.config.pad_token_id)


def _logits(model: Any, ids_T: Tensor) -> Tensor:
    """logits_PV of a model that predicts tokens; of a head logits_TC, or logits_1C of a class."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "lm_head"):
        places_P = compared_positions(len(ids_T))
        return model(input_ids=ids_T[None], logits_to_keep=places_P).logits[0].float()
    output = model(input_ids=ids_T[None])
    if "start_logits" in output:
        return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1).float()
    logits: Tensor = output.logits[0].float()
    return logits if logits.ndim == 2 else logits[None]
