"""Proof that an exported model answers like the one that was trained.

The export is opened by its real consumer, transformers or peft, in fp32, and compared with the
live model on the same tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.model.llama import LlamaWithHead, Model
from llamaweft.model.pack import Pack
from llamaweft.weights.codecs import codec_of, decode
from llamaweft.weights.frozen import encode

TOLERANCES = {"peft": 1e-4, "fp32": 1e-4, "bf16": 5e-2}
"""Norm of the difference of logits over their norm. fp32 differs by the order of summation;
bf16 weights have 8 bits of mantissa, 0.4% each (docs/export.md has what was measured)."""


@dataclass(frozen=True)
class Parity:
    """consumer: what opened the export. relative_difference: norm of the difference of the
    logits over their norm. max_difference: of a single logit. kl: mean KL divergence of the
    next-token distributions, in nats. same_greedy_tokens: share of equal argmaxes."""

    consumer: str
    relative_difference: float
    max_difference: float
    kl: float
    same_greedy_tokens: float
    tokens: int
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.relative_difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def verify_merged(live: Model, folder: Path, dtype: str, prompts: list[np.ndarray]) -> Parity:
    """Compare a merged folder, opened by transformers, with the live model."""
    consumer = _opened(folder, live)
    name = f"transformers.{auto_class(live)}"
    return _compare(live, consumer, name, TOLERANCES[dtype], prompts)


def auto_class(live: Model) -> str:
    """The class of transformers that opens such a model."""
    if not isinstance(live, LlamaWithHead):
        return "AutoModelForCausalLM"
    return live.head_config.architecture.replace("Llama", "AutoModel")


def verify_adapter(
    live: Model, folder: Path, base: str, base_weights: str, prompts: list[np.ndarray]
) -> Parity:
    """Compare an adapter folder, opened by peft on its base model held in the codec
    `base_weights`, with the live model.

    Raises UserError when peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError(
            "peft is not installed, so the adapter cannot be proven; pip install peft, or export "
            "with --no-verify"
        ) from None
    model = _opened(base, live)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # held as the live model holds it: matrices rounded, norms not
            codec = codec_of(name, base_weights, parameter.ndim)
            parts = encode(codec, parameter.data)
            parameter.data = decode(codec, parts, torch.float32)
    if model.config.vocab_size != live.config.vocab_size:  # as peft's AutoPeftModel does
        model.resize_token_embeddings(live.config.vocab_size, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        consumer = PeftModel.from_pretrained(model, folder)
    return _compare(live, consumer, "peft.PeftModel", TOLERANCES["peft"], prompts)


def _opened(folder: Path | str, live: Model) -> Any:
    """The model in transformers, in fp32, without a progress bar. A base gets a head of the live
    model's size, which an adapter then fills."""
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    more = {}
    if isinstance(live, LlamaWithHead) and live.head_config.name == "score":
        more["num_labels"] = live.head_config.outputs
    try:
        kind = getattr(transformers, auto_class(live))
        return kind.from_pretrained(folder, dtype=torch.float32, **more)
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.inference_mode()
def _compare(
    live: Model,
    consumer: Any,
    name: str,
    tolerance: float,
    prompts: list[np.ndarray],
) -> Parity:
    consumer.eval()
    live.eval()
    pad = consumer.config.pad_token_id
    logits = zip(_in_fp32(live, prompts), prompts, strict=True)
    ours_TV = torch.cat([_given(live, one, ids, pad) for one, ids in logits])
    theirs_TV = torch.cat(
        [_logits(consumer(torch.from_numpy(ids.astype(np.int64))[None])) for ids in prompts]
    ).float()
    difference_TV = ours_TV - theirs_TV
    log_p_TV, log_q_TV = ours_TV.log_softmax(-1), theirs_TV.log_softmax(-1)
    kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    return Parity(
        consumer=name,
        relative_difference=float(difference_TV.norm() / ours_TV.norm()),
        max_difference=float(difference_TV.abs().max()),
        kl=float(kl_T.mean()),
        same_greedy_tokens=float((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).float().mean()),
        tokens=len(ours_TV),
        tolerance=tolerance,
    )


def _logits(output: Any) -> Tensor:
    """Logits by position, of what a model of transformers gives; of a class, at one position."""
    if "start_logits" in output:
        return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
    logits: Tensor = output.logits[0]
    return logits if logits.ndim == 2 else logits[None]


def _given(live: Model, logits_TC: Tensor, ids: np.ndarray, pad: int | None) -> Tensor:
    """The positions that transformers gives: of a classifier of texts the last that is no
    padding."""
    if auto_class(live) != "AutoModelForSequenceClassification":
        return logits_TC
    read = int(np.flatnonzero(ids != pad).max(initial=0))
    return logits_TC[read : read + 1]


def _in_fp32(live: Model, prompts: list[np.ndarray]) -> list[Tensor]:
    """Logits of the live model on the CPU, computed in fp32 whatever it was trained in."""
    before = live.model.compute_dtype
    live.model.compute_dtype = torch.float32
    try:
        documents = [_Tokens(ids) for ids in prompts]
        return [live(Pack.from_documents([d]).to(live.device)).cpu() for d in documents]
    finally:
        live.model.compute_dtype = before


class _Tokens:
    """A document without labels."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids, self.weights = ids, np.zeros(len(ids), np.float32)
