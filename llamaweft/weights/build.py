"""Make a store, a few rows at a time: what is held in memory is a chunk, never a tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor

from llamaweft.files import need_disk, written_aside
from llamaweft.weights.codecs import (
    PLAIN,
    codec_of,
    encode_scales,
    encoded_bytes,
    layout,
)
from llamaweft.weights.kernels import encode_rows
from llamaweft.weights.store import DATA, INDEX, SAFETENSORS_DTYPES, VERSION

CHUNK_BYTES = 64 * 2**20
"""fp32 bytes of the rows that are converted at once."""


@dataclass(frozen=True)
class Source:
    """A tensor to encode. chunks: how many rows at once -> those rows, one chunk after another,
    in any floating dtype."""

    name: str
    shape: tuple[int, ...]
    chunks: Callable[[int], Iterable[Tensor]]


def write_store(
    folder: Path,
    codec: str,
    sources: list[Source],
    origin: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encode `sources` into a new store. origin: what the weights are, checked when it is opened
    again. progress: told (tensors done, of all).

    Peak memory: a chunk in fp32, its code, and the fp32 scales of one tensor. Raises UserError
    when the disk is too small or full (nothing is left behind), or a shape does not suit the codec.
    """
    plan = {s.name: (s, codec_of(s.name, codec, len(s.shape))) for s in sources}
    sizes = {name: encoded_bytes(kind, source.shape) for name, (source, kind) in plan.items()}
    need_disk(folder, sum(sizes.values()), "the store of the weights")
    with written_aside(folder) as aside:
        tensors: dict[str, Any] = {}
        with (aside / DATA).open("wb") as file:
            places = _write_header(file, {n: (s.shape, kind) for n, (s, kind) in plan.items()})
            for done, (name, (source, kind)) in enumerate(plan.items()):
                if progress is not None:
                    progress(done, len(plan))
                sums = _write_tensor(file, source, kind, places)
                tensors[name] = {"codec": kind, "shape": source.shape, "checksums": sums}
            size = file.seek(0, 2)
        index = {
            "version": VERSION,
            "source": origin,
            "codec": codec,
            "bytes": size,
            "tensors": tensors,
        }
        (aside / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _write_header(
    file: BinaryIO, tensors: dict[str, tuple[tuple[int, ...], str]]
) -> dict[str, int]:
    """Write the safetensors header and reserve the file; returns where each part begins."""
    parts = [
        (f"{name}.{part}", what)
        for name, (shape, codec) in tensors.items()
        for part, what in layout(codec, shape, name).items()
    ]
    # Wide numbers first, so that each part is aligned; safetensors allows no gaps.
    parts.sort(key=lambda item: (-item[1].dtype.itemsize, -len(item[1].shape)))
    header: dict[str, Any] = {}
    end = 0
    for name, what in parts:
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[what.dtype],
            "shape": what.shape,
            "data_offsets": [end, end + what.nbytes],
        }
        end += what.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    file.write(len(text).to_bytes(8, "little") + text)
    start = 8 + len(text)
    file.truncate(start + end)
    return {name: start + entry["data_offsets"][0] for name, entry in header.items()}


def _write_tensor(
    file: BinaryIO, source: Source, codec: str, places: dict[str, int]
) -> dict[str, str]:
    """Encode one tensor chunk by chunk; returns the checksum of each part."""
    offsets = {part: places[f"{source.name}.{part}"] for part in layout(codec, source.shape, "")}
    hashes = {part: xxhash.xxh3_128() for part in offsets}

    def put(part: str, values: np.ndarray | Tensor) -> None:
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        file.seek(offsets[part])
        file.write(raw)
        hashes[part].update(raw)
        offsets[part] += len(raw)

    scales: list[Tensor] = []
    for chunk in source.chunks(rows_at_once(source.shape)):
        if codec in PLAIN:
            put("values", chunk.to(PLAIN[codec]))
            continue
        rows = encode_rows(codec, np.ascontiguousarray(chunk.float().numpy()))
        put("codes", rows["codes"])
        if codec == "nf4":
            scales.append(torch.from_numpy(rows["scales"]))
        else:
            put("scales", rows["scales"])
    if codec == "nf4":
        for part, values in encode_scales(torch.cat(scales)).items():
            put(part, values)
    return {part: state.hexdigest() for part, state in hashes.items()}


def rows_at_once(shape: tuple[int, ...]) -> int:
    """Rows of a tensor of this shape that are converted at once."""
    row_bytes = 4 * (shape[1] if len(shape) > 1 else 1)
    return max(1, CHUNK_BYTES // row_bytes)


def random_source(
    name: str, shape: tuple[int, ...], deviation: float, generator: torch.Generator
) -> Source:
    """Normal numbers as transformers initialises matrices; vectors (norms) are one."""

    def chunks(rows: int) -> Iterator[Tensor]:
        for start in range(0, shape[0], rows):
            size = (min(rows, shape[0] - start), *shape[1:])
            if len(shape) == 1:
                yield torch.ones(size)
            else:
                yield torch.empty(size).normal_(0, deviation, generator=generator)

    return Source(name, shape, chunks)
