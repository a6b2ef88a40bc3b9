"""Export: one merged Hugging Face folder that needs nothing of ours to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from llamaweft.adapters.lora import LoraLinear
from llamaweft.model.llama import LlamaForCausalLM, RMSNorm
from llamaweft.model.save import write_model
from llamaweft.weights.codecs import PLAIN
from llamaweft.weights.linear import Embedding, Linear


def merged_tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, one at a time, adapters merged in fp32."""
    tied = model.config.tie_word_embeddings
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield f"{name}.weight", module.merged()
        elif isinstance(module, Linear | Embedding):
            if not name.endswith(".base_layer") and not (tied and module is model.lm_head):
                yield f"{name}.weight", module.dequantised()
        elif isinstance(module, RMSNorm):
            yield f"{name}.weight", module.weight.detach()


def export_merged(
    model: LlamaForCausalLM,
    tokenizer: object,
    folder: Path,
    dtype: str,
    stop_ids: Iterable[int],
) -> None:
    """Write the merged folder. `dtype`: fp32 or bf16. Raises OSError."""
    write_model(
        folder,
        model.config,
        merged_tensors(model),
        tokenizer.save_pretrained,  # type: ignore[attr-defined]
        dtype=PLAIN[dtype],
        stop_ids=stop_ids,
    )
