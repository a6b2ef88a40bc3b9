"""Export: one merged Hugging Face folder that needs nothing of ours to run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from llamaweft.adapters.lora import lora_layers
from llamaweft.model.llama import LlamaForCausalLM
from llamaweft.model.save import write_model
from llamaweft.runtime import DTYPES


def merged_tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, adapters merged in fp32."""
    adapted = lora_layers(model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        layer, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        value = adapted[layer].merged() if layer in adapted else parameter.detach()
        yield f"{layer}.{leaf}", value


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
        dtype=DTYPES[dtype],
        stop_ids=stop_ids,
    )
