"""A trained head alone: its weights as safetensors under transformers' names, and what they mean.

N: tokens   C: outputs of the head   E: hidden size
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llamaweft.export.parity import Answers, hidden_states
from llamaweft.model.llama import LlamaWithHead

WEIGHTS, CONFIG = "head.safetensors", "config.json"


def write_head(model: LlamaWithHead, described: dict[str, Any], folder: Path) -> None:
    """Write the head of a model in fp32. described: what config.json says of it. Raises OSError."""
    name = model.head_config.name
    tensors = {
        f"{name}.{part}": value.detach().float().cpu().contiguous()
        for part, value in model.head.named_parameters()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    content = {"hidden_size": model.config.hidden_size, "task": model.head_config.task, **described}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def in_torch(model: LlamaWithHead, folder: Path, prompts: Sequence[np.ndarray]) -> Answers:
    """What the written head says of the live model's hidden states, by torch's own layer."""
    name = model.head_config.name
    tensors = load_file(folder / WEIGHTS)
    bias = tensors.get(f"{name}.bias")
    before, model.model.compute_dtype = model.model.compute_dtype, torch.float32
    try:
        hidden = [hidden_states(model, ids).cpu() for ids in prompts]
    finally:
        model.model.compute_dtype = before
    weight = tensors[f"{name}.weight"]
    logits = [torch.nn.functional.linear(h_NE, weight, bias) for h_NE in hidden]
    everywhere = [torch.arange(len(h_NE)) for h_NE in hidden]
    return Answers("torch.nn.functional.linear", logits, given=everywhere)
