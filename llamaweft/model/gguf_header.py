"""What a GGUF file claims about itself, held against its size before anything believes it.

The `gguf` library makes objects of every count that a file names. Here the header is walked once,
without making any, and each count, length, dimension and place must fit into the file. The format:
llama.cpp's GGUF specification, version 2 and 3
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from llamaweft.errors import UserError

VERSIONS = (2, 3)
MAX_ENTRIES = 2**16
"""Tensors, and keys. The largest Llama has 1138 tensors."""
MAX_ELEMENTS = 2**21
"""Of all arrays together: the library makes an object of each. Llama 3's tokenizer has 0.54
million."""
MAX_TEXT_BYTES = 2**24
"""Of a text. Chat templates, the longest, have some thousands."""
MAX_DIMENSIONS = 4
"""ggml's GGML_MAX_DIMS."""
ALIGNMENT_KEY = b"general.alignment"

FIXED_BYTES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


class _BrokenError(Exception):
    """What does not fit, in a few words."""


def check_header(path: Path) -> None:
    """Raises UserError for a file that is cut short, or claims what cannot be: more than it has
    room for, unknown types, tensors that overlap or lie outside of it."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _Header(data).check()
    except (_BrokenError, OSError, ValueError) as error:  # ValueError: of an empty file
        raise UserError(
            f"{path}: cannot be read as GGUF, most likely because it is cut short or damaged "
            f"({error}): download it again."
        ) from None


class _Header:
    """A walk from the beginning of a file to where its tensors lie."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.elements = data, 4, 0
        self.alignment = GGUF_DEFAULT_ALIGNMENT

    def check(self) -> None:
        version = self.number("<I")
        if version not in VERSIONS:
            raise _BrokenError(f"version {version}, and {VERSIONS} are read")
        tensors, keys = self.number("<Q"), self.number("<Q")
        if max(tensors, keys) > MAX_ENTRIES:
            raise _BrokenError(f"{tensors} tensors and {keys} keys")
        for _ in range(keys):
            self.field()
        places = [self.tensor() for _ in range(tensors)]
        start = self.at + -self.at % self.alignment
        end = 0
        for offset, size, name in sorted(places):
            if offset < end:
                raise _BrokenError(f"the tensor {name} overlaps another")
            end = offset + size
            if start + end > len(self.data):
                raise _BrokenError(f"the tensor {name} ends outside the file")

    def number(self, kind: str) -> int:
        value = struct.unpack_from(kind, self.data, self.skip(struct.calcsize(kind)))[0]
        assert isinstance(value, int)
        return value

    def skip(self, count: int) -> int:
        """Where the next `count` bytes begin; they are passed over."""
        start = self.at
        if count > len(self.data) - start:
            raise _BrokenError("the header ends outside the file")
        self.at += count
        return start

    def text(self) -> int:
        """Where a text begins; it ends before `at`."""
        length = self.number("<Q")
        if length > MAX_TEXT_BYTES:
            raise _BrokenError(f"a text of {length} bytes")
        return self.skip(length)

    def name(self) -> bytes:
        start = self.text()
        name = self.data[start : self.at]
        if not name.decode(errors="replace").isprintable():
            raise _BrokenError("a name that cannot be shown")
        return name

    def field(self) -> None:
        key = self.name()
        kind = self.kind()
        start = self.at
        if kind == GGUFValueType.ARRAY:
            self.array()
        else:
            self.value(kind)
        if key == ALIGNMENT_KEY:
            if kind != GGUFValueType.UINT32:
                raise _BrokenError("an alignment that is no number")
            (self.alignment,) = struct.unpack_from("<I", self.data, start)
            if self.alignment.bit_count() != 1:
                raise _BrokenError(f"an alignment of {self.alignment}, which is no power of two")

    def kind(self) -> GGUFValueType:
        number = self.number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _BrokenError(f"a value of the unknown type {number}") from None

    def value(self, kind: GGUFValueType) -> None:
        if kind == GGUFValueType.STRING:
            self.text()
        elif kind == GGUFValueType.ARRAY:
            raise _BrokenError("an array of arrays")
        else:
            self.skip(FIXED_BYTES[kind])

    def array(self) -> None:
        kind, count = self.kind(), self.number("<Q")
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise _BrokenError(f"arrays of more than {MAX_ELEMENTS} values")
        for _ in range(count):
            self.value(kind)

    def tensor(self) -> tuple[int, int, str]:
        """Where its numbers begin, how many bytes they have, and its name."""
        name = self.name().decode(errors="replace")[:80]
        dimensions = self.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _BrokenError(f"the tensor {name} with {dimensions} dimensions")
        sizes = [self.number("<Q") for _ in range(dimensions)]
        number, offset = self.number("<I"), self.number("<Q")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        except (ValueError, KeyError):
            raise _BrokenError(f"the tensor {name} of the unknown type {number}") from None
        if not all(sizes) or sizes[0] % block:
            raise _BrokenError(f"the tensor {name} with the dimensions {sizes}")
        return offset, math.prod(sizes) // block * block_bytes, name
