"""The store: a model's frozen weights in their codecs, on disk, mapped into memory.

A store is a folder with two files. `weights.safetensors` holds every part of every tensor, as
`NAME.PART`. `store.json` says which codec each tensor has, where the weights come from, how long
the file is, and the checksum (XXH3, 128 bits) of each part.

The mapping is read-only and shared with the page cache: pages come from the disk when they are
read, and the system may drop them again. Opening checks version, length and header; the checksum
of a tensor is verified at its first read.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.weights.codecs import layout
from llamaweft.weights.frozen import FrozenWeight, Scratch

VERSION = 1
DATA, INDEX = "weights.safetensors", "store.json"
SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
}
_TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


class DamagedStoreError(UserError):
    """The store is cut short, changed, or of another version; a cached one can be made again."""


class Store:
    """An open store.

    Raises DamagedStoreError, at opening or at a first read, when it is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _read_index(folder)
        path = folder / DATA
        try:
            with path.open("rb") as file:
                self._check_size(path)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise DamagedStoreError(f"{path} cannot be read: {error.strerror}") from None
        self._places = self._read_header(path)
        self._scratch = Scratch()

    def _check_size(self, path: Path) -> None:
        size = path.stat().st_size
        if size != self.index["bytes"]:
            raise DamagedStoreError(
                f"{path} has {size} bytes and should have {self.index['bytes']}; it was cut short "
                "or changed: delete the folder and make it again"
            )

    def _read_header(self, path: Path) -> dict[str, tuple[int, dict[str, Any]]]:
        """Part name -> (offset in the file, its entry)."""
        try:
            length = int.from_bytes(self._map[:8], "little")
            header = json.loads(self._map[8 : 8 + length])
            places = {k: (8 + length + v["data_offsets"][0], v) for k, v in header.items()}
            for name, entry in self.index["tensors"].items():
                for part, want in layout(entry["codec"], tuple(entry["shape"]), name).items():
                    offset, found = places[f"{name}.{part}"]
                    start, end = found["data_offsets"]
                    fits = 0 <= start <= end and offset + end - start <= len(self._map)
                    alike = tuple(found["shape"]) == want.shape and end - start == want.nbytes
                    named = SAFETENSORS_DTYPES[want.dtype] == found["dtype"]
                    checked = isinstance(entry["checksums"][part], str)
                    if not (fits and alike and named and checked):
                        raise ValueError(name)
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            raise DamagedStoreError(
                f"{path} does not have the header of its {INDEX}; delete the folder and make it "
                "again"
            ) from None
        return places

    @property
    def codec(self) -> str:
        """What the layers are held in."""
        return str(self.index["codec"])

    @property
    def names(self) -> list[str]:
        return list(self.index["tensors"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.index["tensors"][name]["shape"])

    def parts(self, name: str) -> dict[str, Tensor]:
        """The arrays of a tensor: views of the mapping, not verified."""
        entry = self.index["tensors"][name]
        found = {}
        for part in layout(entry["codec"], tuple(entry["shape"]), name):
            offset, where = self._places[f"{name}.{part}"]
            flat = torch.frombuffer(
                self._map,
                dtype=_TORCH_DTYPES[where["dtype"]],
                count=math.prod(where["shape"]),
                offset=offset,
            )
            found[part] = flat.view(where["shape"])
        return found

    def matrix(self, name: str) -> FrozenWeight:
        """A matrix, mapped; verified when it is first read."""
        entry = self.index["tensors"][name]
        rows, columns = entry["shape"]
        return FrozenWeight(
            entry["codec"],
            (rows, columns),
            self.parts(name),
            scratch=self._scratch,
            verify=lambda: self.verify(name),
        )

    def vector(self, name: str) -> Tensor:
        """A norm's weight in fp32, verified, as memory of its own."""
        self.verify(name)
        return self.parts(name)["values"].float().clone()

    def verify(self, name: str) -> None:
        """Raises DamagedStoreError when a part does not have its checksum."""
        sums = self.index["tensors"][name]["checksums"]
        for part, values in self.parts(name).items():
            if checksum(values) != sums[part]:
                raise DamagedStoreError(
                    f"{self.folder / DATA}: {name} is damaged (its checksum is wrong); delete the "
                    "folder and make it again"
                )

    def will_need(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors ahead; returns at once."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        for name in names:
            for part in self.parts(name):
                offset, where = self._places[f"{name}.{part}"]
                start, end = where["data_offsets"]
                first = offset // mmap.PAGESIZE * mmap.PAGESIZE
                self._map.madvise(mmap.MADV_WILLNEED, first, offset + end - start - first)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["version"]
        _ = index["bytes"], index["codec"], index["tensors"], index["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(
            f"{path} cannot be read ({error}); delete the folder and make it again"
        ) from None
    if version != VERSION:
        raise DamagedStoreError(
            f"{folder} is a store of version {version}, and this program reads {VERSION}; delete "
            "the folder and make it again"
        )
    return index


def checksum(values: Tensor) -> str:
    """XXH3 (128 bits) over the bytes of a contiguous tensor."""
    return xxhash.xxh3_128(values.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
