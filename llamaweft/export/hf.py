"""Export: one merged Hugging Face folder that needs nothing of ours to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llamaweft.adapters.lora import lora_layers
from llamaweft.model.llama import LlamaForCausalLM
from llamaweft.model.save import write_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def merged_tensors(model: LlamaForCausalLM, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, adapters merged in fp32 and then rounded."""
    adapted = lora_layers(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        layer, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        value = adapted[layer].merged() if layer in adapted else parameter.detach()
        yield f"{layer}.{leaf}", value.to(dtype)


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
        merged_tensors(model, DTYPES[dtype]),
        tokenizer.save_pretrained,  # type: ignore[attr-defined]
        dtype=CONFIG_NAMES[dtype],
        stop_ids=stop_ids,
    )
