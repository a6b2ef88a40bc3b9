"""Tensors that several ranks hold in parts, in files: torch.distributed.checkpoint with its
safetensors storage, so without pickles.

Each rank writes one file of its parts, with their places; any other number of ranks reads what it
needs of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def is_in_parts(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it only, and knows which (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def write_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """All ranks must call it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer)


def outlines(folder: Path) -> dict[str, Tensor]:
    """Shapes and dtypes of what `write_parts` wrote; none where there is no folder."""
    if not folder.exists():
        return {}
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(kept.size, dtype=kept.properties.dtype, device="meta")
        for name, kept in found.items()
        if isinstance(kept, TensorStorageMetadata)
    }


def read_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill these tensors, plain or in parts; all ranks must call it."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
