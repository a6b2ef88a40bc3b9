"""Export: one merged Hugging Face folder that needs nothing of ours to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from llamaweft.adapters.lora import LoraLinear
from llamaweft.model.llama import LlamaWithHead, Model, RMSNorm
from llamaweft.model.save import write_model
from llamaweft.model.task_heads import TaskHead
from llamaweft.weights.codecs import PLAIN
from llamaweft.weights.linear import Embedding, Linear


def merged_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, one at a time, adapters merged in fp32."""
    tied = model.config.tie_word_embeddings
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield f"{name}.weight", module.merged()
        elif isinstance(module, Linear | Embedding):
            if not name.endswith(".base_layer") and not (tied and name == "lm_head"):
                yield f"{name}.weight", module.dequantised()
        elif isinstance(module, TaskHead):
            for part, value in module.named_parameters():
                yield f"{name}.{part}", value.detach()
        elif isinstance(module, RMSNorm):
            yield f"{name}.weight", module.weight.detach()


def described(model: Model, tokenizer: Any) -> dict[str, Any]:
    """What config.json says of a model with a head, beside what it says of any: transformers reads
    the last token that is no padding. A reward is read so in training, where the end token pads if
    the tokenizer has no other."""
    if not isinstance(model, LlamaWithHead):
        return {}
    pad = tokenizer.pad_token_id
    if pad is None and model.head_config.task == "reward":
        pad = tokenizer.eos_token_id
    return model.head_config.to_config() | {"pad_token_id": pad}


def export_merged(
    model: Model,
    tokenizer: Any,
    folder: Path,
    dtype: str,
    stop_ids: Iterable[int],
) -> None:
    """Write the merged folder. `dtype`: fp32 or bf16. Raises OSError."""
    write_model(
        folder,
        model.config,
        merged_tensors(model),
        tokenizer.save_pretrained,
        dtype=PLAIN[dtype],
        stop_ids=stop_ids,
        more=described(model, tokenizer),
    )
