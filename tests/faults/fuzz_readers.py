"""Damages valid files of every kind at random and reads them: each read must end in rows or in a
UserError, in little time and memory.

    python tests/faults/fuzz_readers.py --seconds 60 --seed 0     (Linux)

The reading is done in a process of its own, so that one that crashes or hangs is counted too. Ends
with 1, and keeps the file, when a read ends in any other way.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llamaweft.data.rows import MAX_ROW_BYTES, BadRows, unfit
from llamaweft.data.sources import read_path, read_rows
from llamaweft.errors import UserError

SECONDS_ALLOWED = 10.0
MIB_ALLOWED = 12 * MAX_ROW_BYTES // 2**20
"""What a read may add to the process: a row in the greatest of its forms, as bytes, text, values."""

TOKENS = [
    *(b'"', b'""', b"\n", b"\r\n", b"\r", b",", b"\t", b"\\", b"[", b"]", b"{", b"}", b":", b" "),
    *(b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b\x08"),
    *(b"\\ud800", b"\\udc00", b"\\u0000", b"\\u", b"NaN", b"-Infinity", b"1e999", b"null"),
    *(b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\n" * 5000, b'"' * 5001, b"x" * 200_000),
    *(b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x80" * 9, b"\x28\xb5\x2f\xfd"),
]


class Source:
    """A file, as a recipe names it."""

    hub = config = revision = columns = None
    split, format = "train", "auto"

    def __init__(self, path: str) -> None:
        self.path = path


def valid_files() -> dict[str, bytes]:
    """One of each kind, by its ending."""
    rows = [
        {"prompt": f'say "{i}", é 😀\n', "completion": "x" * (i % 7), "n": i, "tags": ["a", str(i)]}
        for i in range(300)
    ]
    columns = ["prompt", "completion", "n"]
    table = pa.Table.from_pylist(rows)
    table = table.append_column("kind", pa.array(["a", "b", None] * 100).dictionary_encode())
    files = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        ".ndjson": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode(),
        ".json": json.dumps(rows, indent=1).encode(),
        ".txt": "\n".join(row["prompt"] for row in rows).encode(),
        ".md": "# é\n\n".encode() * 50,
    }
    for ending, mark in ((".csv", ","), (".tsv", "\t")):
        quoted = [[str(row[name]).replace('"', '""') for name in columns] for row in rows]
        lines = [mark.join(f'"{value}"' for value in values) for values in [columns, *quoted]]
        files[ending] = "\n".join(lines).encode()
    for ending in (".jsonl", ".json", ".csv", ".txt"):
        files[ending + ".gz"] = gzip.compress(files[ending], mtime=0)
        files[ending + ".zst"] = pa.compress(files[ending], "zstd", asbytes=True)
    for codec in ("none", "snappy", "zstd"):
        sink = io.BytesIO()
        pq.write_table(table, sink, compression=codec, row_group_size=100)
        files[f"-{codec}.parquet"] = sink.getvalue()
    for name, new in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        for codec in (None, "zstd"):
            sink = io.BytesIO()
            with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as out:
                out.write_table(table, max_chunksize=100)
            files[f"-{name}-{codec}.arrow"] = sink.getvalue()
    return files


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content after a few random edits."""
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        place = draw.randrange(len(content) + 1)
        # Where a format keeps its structure: at its beginning and its end.
        place = draw.choice((place, place, min(place, 64), max(0, len(content) - place % 400)))
        length = draw.choice((0, 1, 4, draw.randrange(1000)))
        match draw.randrange(6):
            case 0:
                content = content[:place]
            case 1:
                content = content[:place] + content[place + length :]
            case 2:
                content = content[:place] + draw.choice(TOKENS) + content[place:]
            case 3:
                token = draw.choice(TOKENS)
                content = content[:place] + token + content[place + len(token) :]
            case 4:
                content = content[:place] + draw.randbytes(length) + content[place + length :]
            case _:
                content = content[:place] + content[place : place + length] * 3 + content[place:]
    return content


def reader(pipe: Connection) -> None:
    """Reads what it is told to; answers how that ended and how many MiB it added at most."""
    for path, policy in iter(pipe.recv, None):
        bad = BadRows(policy)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory_mib("VmRSS")
        try:
            fit = [unfit(row.content) is None for row in read_rows(Source(path), bad)]
            ended = "rows" if all(fit) and not bad.count else "rows, some passed over"
            if not all(fit):
                ended = "FAILED: a row that is not fit"
        except UserError as error:
            ended = "refused" if len(str(error).splitlines()) == 1 else f"FAILED: {error}"
        except BaseException as error:
            ended = f"FAILED: {type(error).__name__}: {error}"
        pipe.send((ended, memory_mib("VmHWM") - before))


def memory_mib(name: str) -> int:
    """Of this process, as Linux says: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name)) // 1024


class Reading:
    """The process that reads, begun anew after a crash or a hang."""

    def __init__(self, warm: list[str]) -> None:
        self.warm = warm
        self.begin()

    def begin(self) -> None:
        """Every valid file is read first, so that libraries are loaded before memory counts."""
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=reader, args=(theirs,))
        self.process.start()
        theirs.close()
        for path in self.warm:
            self.pipe.send((path, "error"))
            ended, _ = self.pipe.recv()
            assert ended == "rows", f"{path}: {ended}"

    def read(self, path: str, policy: str) -> tuple[str, int]:
        """How it ended, and MiB added to the process."""
        self.pipe.send((path, policy))
        try:
            if self.pipe.poll(SECONDS_ALLOWED):
                return self.pipe.recv()
            ended = f"FAILED: no end in {SECONDS_ALLOWED:.0f} s"
        except (EOFError, ConnectionError):
            self.process.join()
            ended = f"FAILED: the process died ({self.process.exitcode})"
        self.process.kill()
        self.process.join()
        self.begin()
        return ended, 0

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--seed", type=int, default=0)
    asked = options.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    slowest, most, failed = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        files = valid_files()
        for ending, content in files.items():
            (Path(folder) / f"valid{ending}").write_bytes(content)
            assert read_path(f"{folder}/valid{ending}")
        reading = Reading([f"{folder}/valid{ending}" for ending in files])
        until, case = time.monotonic() + asked.seconds, 0
        while time.monotonic() < until:
            draw = random.Random(f"{asked.seed}/{case}")
            ending = list(files)[case % len(files)]
            path = Path(folder) / f"damaged{ending}"
            path.write_bytes(damaged(files[ending], draw))
            before = time.monotonic()
            ended, mib = reading.read(str(path), draw.choice(("error", "skip")))
            slowest, most = max(slowest, time.monotonic() - before), max(most, mib)
            if mib > MIB_ALLOWED:
                ended = f"FAILED: {mib} MiB"
            if ended.startswith("FAILED"):
                failed += 1
                kept = Path(tempfile.gettempdir()) / f"fuzz-{asked.seed}-{case}{ending}"
                kept.write_bytes(path.read_bytes())
                print(f"case {case}: {ended}; the file is {kept}")
            counts[ending]["FAILED" if ended.startswith("FAILED") else ended] += 1
            case += 1
        reading.end()
    for ending, ways in counts.items():
        print(f"{ending:22}", ", ".join(f"{count} {way}" for way, count in sorted(ways.items())))
    print(f"seed {asked.seed}: {case} files, {failed} failed")
    print(f"slowest read {slowest:.2f} s, most memory added {most} MiB of {MIB_ALLOWED}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
