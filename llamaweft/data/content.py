"""A file of rows on this machine: its name, its kind, and its bytes, unpacked."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llamaweft.errors import UserError

TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
TABLE_ENDINGS = (".parquet", ".arrow")
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
"""What may follow the ending of a text file."""

BLOCK_BYTES = 2**16
BOMB_BYTES = 64 * 2**20
BOMB_RATIO = 250
"""A packed file that unpacks to more than both of these is refused."""

_OTHER_TEXT = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}


@dataclass(frozen=True, slots=True)
class File:
    """A file of rows: its name as a person gave it, and where its bytes are."""

    name: str
    path: Path

    @property
    def ending(self) -> str:
        """That of the kind of rows: `.csv` for `my/rows.csv.gz`."""
        return endings_of(self.path.name)[0]

    def blocks(self) -> Iterator[bytes]:
        """The bytes of a text file, unpacked, without a byte order mark, in bounded memory.

        Raises UserError where the file cannot be read, is cut short, is no UTF-8 text from its
        first bytes on, or unpacks to BOMB_RATIO times its size.
        """
        packing = endings_of(self.path.name)[1]
        try:
            allowed = max(BOMB_BYTES, BOMB_RATIO * self.path.stat().st_size)
            unpacked = 0
            with _opened(self.path, packing) as file:
                while block := file.read(BLOCK_BYTES):
                    if unpacked == 0:
                        block = _without_mark(self.name, block)
                    unpacked += len(block)
                    if packing and unpacked > allowed:
                        raise UserError(
                            f"{self.name} unpacks to more than {BOMB_RATIO} times its size; "
                            "unpack it yourself if that is meant"
                        )
                    yield block
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(self.name, error, PACKINGS.get(packing)) from None


def is_readable(name: str) -> bool:
    """Whether a file of this name holds rows, as its ending says."""
    ending, packing = endings_of(name)
    return ending in TEXT_ENDINGS or (ending in TABLE_ENDINGS and not packing)


def endings_of(name: str) -> tuple[str, str]:
    stem, ending = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1], ending) if ending in PACKINGS else (ending, "")


def need_ending(name: str, file_name: str) -> None:
    if not is_readable(file_name):
        raise UserError(
            f"{name}: rows are read from files that end in {known_endings()}; rename or convert it"
        )


def known_endings() -> str:
    return f"{' '.join((*TEXT_ENDINGS, *TABLE_ENDINGS))} (text also in .gz or .zst)"


def _opened(path: Path, packing: str) -> BinaryIO | Any:
    if packing == ".gz":
        return gzip.open(path, "rb")
    if packing == ".zst":
        import pyarrow as pa

        return pa.input_stream(str(path), compression="zstd")
    return path.open("rb")


def _without_mark(name: str, block: bytes) -> bytes:
    """The first block of a UTF-8 text, without its byte order mark."""
    for start, ending in _PACKED.items():
        if block.startswith(start):
            raise UserError(f"{name} is packed; let its name end in {ending}")
    # Without a mark, every second byte of the first two characters is zero.
    if block.startswith(_OTHER_TEXT) or [bool(byte) for byte in block[:4]] in (
        [True, False, True, False],
        [False, True, False, True],
    ):
        raise UserError(f"{name} is not UTF-8 text but UTF-16 or UTF-32; convert it first")
    return block.removeprefix(b"\xef\xbb\xbf")


def unreadable(name: str, error: Exception, packing: str | None = None) -> UserError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    reason = " ".join(reason.split())
    if packing and not getattr(error, "errno", None):  # not the system's complaint
        return UserError(
            f"{name} is cut short or not a {packing} file ({reason}); fetch or pack it anew"
        )
    return UserError(f"{name} cannot be read: {reason}")
