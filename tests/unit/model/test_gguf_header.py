"""GGUF files that claim what cannot be: refused in one sentence, soon, and without memory for it."""

from __future__ import annotations

import contextlib
import random
import resource
import struct
import time
from pathlib import Path

import gguf
import pytest
from test_gguf import tiny, write

from llamaweft.errors import UserError
from llamaweft.model import gguf as importer
from llamaweft.model.gguf import convert_gguf
from llamaweft.model.gguf_header import check_header

U8, U32, F32, STRING, ARRAY = 0, 4, 6, 8, 9
Q8_0 = int(gguf.GGMLQuantizationType.Q8_0)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def file(
    fields: list[bytes] | bytes = b"",
    tensors: list[bytes] | bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 4096,
) -> bytes:
    fields, tensors = (
        one if isinstance(one, list) else [one] if one else [] for one in (fields, tensors)
    )
    said = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, *said) + b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


SOUND = {
    "empty": file(),
    "fields": file([field("a", STRING, text("é")), field("b", U32, struct.pack("<I", 3))]),
    "array": file(field("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text(""))),
    "tensors": file(tensors=[tensor("a", [32, 16]), tensor("b", [32, 4], offset=2048)]),
    "quantised": file(tensors=tensor("a", [64, 2], Q8_0)),
    "aligned": file(field("general.alignment", U32, struct.pack("<I", 64)), version=2),
}
HOSTILE = {
    "version": (file(version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "many keys": (file(counts=(0, 2**63)), "keys"),
    "many tensors": (file(counts=(2**62, 0)), "tensors"),
    "more keys than there are": (file(field("a", U8, b"1"), counts=(0, 50), data=0), "outside"),
    "long text": (file(field("a", STRING, struct.pack("<Q", 2**62))), "a text of"),
    "long key": (file(struct.pack("<Q", 2**40)), "a text of"),
    "text past the end": (file(field("a", STRING, struct.pack("<Q", 2**20))), "outside the file"),
    "endless array": (
        file(field("a", ARRAY, struct.pack("<IQ", U8, 2**40))),
        "arrays of more than",
    ),
    "long array": (file(field("a", ARRAY, struct.pack("<IQ", U8, 2**20))), "outside the file"),
    "nested": (
        file(field("a", ARRAY, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1))),
        "array of arrays",
    ),
    "type": (file(field("a", 77, b"")), "unknown type 77"),
    "array type": (file(field("a", ARRAY, struct.pack("<IQ", 77, 1))), "unknown type 77"),
    "alignment": (file(field("general.alignment", U32, struct.pack("<I", 48))), "no power of two"),
    "no alignment": (
        file(field("general.alignment", U32, struct.pack("<I", 0))),
        "no power of two",
    ),
    "alignment as text": (file(field("general.alignment", STRING, text(""))), "no number"),
    "dimensions": (file(tensors=tensor("a", [1] * 9)), "9 dimensions"),
    "no dimension": (file(tensors=tensor("a", [])), "0 dimensions"),
    "huge": (file(tensors=tensor("a", [2**63, 2**63])), "ends outside the file"),
    "zero": (file(tensors=tensor("a", [0, 4])), "with the dimensions"),
    "tensor type": (file(tensors=tensor("a", [32], kind=999)), "unknown type 999"),
    "half a block": (file(tensors=tensor("a", [33], Q8_0)), "with the dimensions"),
    "far away": (file(tensors=tensor("a", [32], offset=2**63)), "ends outside the file"),
    "one over the end": (file(tensors=tensor("a", [1025])), "ends outside the file"),
    "overlap": (
        file(tensors=[tensor("a", [64]), tensor("b", [64], offset=128)]),
        "overlaps another",
    ),
    "two lines": (file(tensors=tensor("a\nb", [32])), "cannot be shown"),
    "nothing": (b"", "empty"),
}


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_header_passes_and_the_library_reads_it(tmp_path, case):
    (tmp_path / "m.gguf").write_bytes(SOUND[case])
    check_header(tmp_path / "m.gguf")
    gguf.GGUFReader(tmp_path / "m.gguf")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_claim_that_cannot_be_is_refused_at_once(tmp_path, case):
    content, says = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=says) as refused:
        check_header(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert time.perf_counter() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_metadata_that_makes_no_sense_is_refused(tmp_path):
    sound = write(tmp_path / "sound.gguf", tiny()).read_bytes()

    def changed(key: str, old: bytes, new: bytes) -> bytes:
        place = sound.index(key.encode()) + len(key)
        assert sound[place : place + len(old)] == old
        return sound[:place] + new + sound[place + len(old) :]

    number = struct.pack("<I", U32)
    cases = {
        "layers": changed(
            "llama.block_count", number + struct.pack("<I", 2), number + b"\xff\xff\xff\xff"
        ),
        "heads as a fraction": changed(
            "llama.attention.head_count", number, struct.pack("<I", F32)
        ),
        "heads": changed(
            "llama.attention.head_count", number + struct.pack("<I", 4), number + bytes(4)
        ),
        "begin": changed(
            "tokenizer.ggml.bos_token_id",
            number + struct.pack("<I", 259),
            number + b"\xff\xff\xff\x7f",
        ),
        "tokens": sound.replace(b"abc", b"\xff\xfe\xfd", 1),
        "merge": sound.replace(b"a b", b"a_b", 1),
        "kinds": sound.replace(b"tokenizer.ggml.token_type", b"tokenizer.ggml.token_typo", 1),
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(UserError) as refused:
            convert_gguf(path, tmp_path / "out")
        assert str(path) in str(refused.value), name
        assert not (tmp_path / "out").exists()


def test_a_file_with_thousands_of_control_tokens_is_refused(tmp_path, monkeypatch):
    from llamaweft.model import gguf_tokenizer

    monkeypatch.setattr(gguf_tokenizer, "MAX_ADDED", 3)
    path = write(tmp_path / "m.gguf", tiny())
    with pytest.raises(UserError, match="more than 3 tokens are control tokens"):
        convert_gguf(path, tmp_path / "out")


def _damaged(content: bytes, draw: random.Random, header: int) -> bytes:
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(header)
        new = draw.choice((b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", draw.randbytes(4), b""))
        cut = draw.choice((0, len(new), 1))
        content = content[:place] + new + content[place + cut :]
    return content


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_damaged_ends_in_a_model_or_a_sentence(tmp_path, monkeypatch, seed):
    # The tokenizer's part of it once in a while: it takes most of the time.
    sound = write(tmp_path / "sound.gguf", tiny()).read_bytes()
    header = sound.rindex(b"blk.1.") + 100
    draw, save = random.Random(seed), importer.save_gguf_tokenizer
    path: Path = tmp_path / "m.gguf"
    for index in range(60):
        monkeypatch.setattr(
            importer, "save_gguf_tokenizer", save if index % 12 == 0 else lambda *_: None
        )
        path.write_bytes(_damaged(sound, draw, header))
        began = time.perf_counter()
        with contextlib.suppress(UserError):
            convert_gguf(path, tmp_path / f"out{index}")
        assert time.perf_counter() - began < 5
