"""Preparing data: against the tokenizers library's own batch encoding, and in bounded memory.

    python -m benchmarks.bench_data speed                     in turn with encode_batch
    python -m benchmarks.bench_data memory --rows 10000000    peak memory, and rows a second

Speed: `Preparation` reads a JSONL file, renders, tokenises, masks, looks for mistakes and writes
the prepared rows; encode_batch gets the same texts, read and rendered beforehand, and its encodings
are thrown away.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks import data, models, report
from benchmarks.contender import ROOT, Peak
from llamaweft.data.chat import Encoder
from llamaweft.data.formats import to_examples
from llamaweft.data.loader import Loader
from llamaweft.data.prepare import Preparation
from llamaweft.data.sources import PlainSource, read_path
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.runtime import anon_bytes, cache_dir

CHUNK = 1024


def rows_of(kind: str, chats: Path) -> Iterator[dict[str, Any]]:
    """Rows without end, each with a number so that no two are alike."""
    given = [row.content for row in read_path(str(chats))]
    for number, row in enumerate(cycle(given)):
        messages = [dict(message) for message in row["messages"]]
        messages[0]["content"] = f"{number}. {messages[0]['content']}"
        if kind == "chats":
            yield {"messages": messages}
        else:
            yield {"text": "\n\n".join(message["content"] for message in messages)}


def write_rows(kind: str, chats: Path, count: int, path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for row in islice(rows_of(kind, chats), count):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def preparation(tokenizer: Any, kind: str) -> Preparation:
    return Preparation(
        tokenizer,
        task="chat" if kind == "chats" else "text",
        train_on="assistant",
        max_length_tokens=100_000,
        on_too_long=None,
        seed=0,
    )


def prepare(tokenizer: Any, kind: str, path: Path) -> tuple[float, int]:
    """Seconds and tokens, without what was prepared before."""
    shutil.rmtree(cache_dir() / "prepared", ignore_errors=True)
    began = time.perf_counter()
    made = preparation(tokenizer, kind).prepare([(PlainSource(str(path)), 1.0)], None, None)
    return time.perf_counter() - began, made.audit.tokens


def encode(encoder: Encoder, texts: list[str]) -> float:
    """Seconds of the library for the same texts."""
    began = time.perf_counter()
    for start in range(0, len(texts), CHUNK):
        encoder.core.encode_batch(texts[start : start + CHUNK], add_special_tokens=False)
    return time.perf_counter() - began


def speed(tokenizer: Any, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    path = write_rows(kind, options.chats, options.rows, options.work / f"prepared-{kind}.jsonl")
    encoder = Encoder(tokenizer)
    examples = list(to_examples(read_path(str(path)), "chat" if kind == "chats" else "text"))
    texts = [text.text for text in encoder.render(examples)]
    del examples
    ratios, times = [], []
    prepare(tokenizer, kind, path)
    for _ in range(options.rounds):
        library = encode(encoder, texts)
        ours, tokens = prepare(tokenizer, kind, path)
        ratios.append(library / ours)
        times.append({"library": library, "prepare": ours})
    return {
        "kind": kind,
        "rows": options.rows,
        "tokens": tokens,
        "share_of_library": statistics.median(ratios),
        "seconds": times,
    }


def memory(tokenizer: Any, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Prepare, and pack the first epoch; the rows are short, as the count is what is measured."""
    path = options.work / f"many-{kind}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(options.rows):
            file.write(json.dumps(short_row(kind, number)) + "\n")
    shutil.rmtree(cache_dir() / "prepared", ignore_errors=True)
    before = anon_bytes()
    with Peak(os.getpid()) as peak:
        began = time.perf_counter()
        made = preparation(tokenizer, kind).prepare(
            [(PlainSource(str(path)), 1.0)], None, options.held_out
        )
        seconds, prepared_peak = time.perf_counter() - began, peak.anon_bytes
        began = time.perf_counter()
        loader = Loader(made.documents, len, micro_batch_tokens=2048, accumulation=4, share=True)
        packing = time.perf_counter() - began
    found = {
        "kind": kind,
        "rows": options.rows,
        "tokens": made.audit.tokens,
        "file_bytes": path.stat().st_size,
        "anon_bytes_before": before,
        "peak_anon_bytes_preparing": prepared_peak,
        "seconds_preparing": seconds,
        "rows_per_second": options.rows / seconds,
        "steps": loader.total_steps,
        "seconds_packing": packing,
        "peak_anon_bytes": peak.anon_bytes,
    }
    path.unlink()
    return found


def short_row(kind: str, number: int) -> dict[str, Any]:
    asked = f"What is {number} plus {number % 97}?"
    answered = f"{number} plus {number % 97} is {number + number % 97}."
    if kind == "text":
        return {"text": f"{asked} {answered}"}
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_data")
    parser.add_argument("case", choices=["speed", "memory"])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--held-out", type=float, help="memory: data.validation.fraction")
    parser.add_argument("--kinds", nargs="*", default=["text", "chats"])
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench", help="the rows")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.chats = data.write_chats(options.work / "chats.jsonl")
    tokenizer = load_tokenizer(models.embedded_folder())
    found, lines = [], []
    for kind in options.kinds:
        if options.case == "speed":
            one = speed(tokenizer, kind, options)
            lines.append(f"{kind}: {one['share_of_library']:.0%} of encode_batch alone")
        else:
            one = memory(tokenizer, kind, options)
            peak = one["peak_anon_bytes"] / report.GIB
            lines.append(
                f"{kind}: {options.rows:,} rows at {one['rows_per_second']:,.0f} rows/s, "
                f"peak {peak:.2f} GiB of anonymous memory"
            )
        found.append(one)
        print(lines[-1], flush=True)
    text = "\n".join(lines)
    page = report.write_page(
        options.results, f"data-{options.case}", f"\n\n```\n{text}\n```", {"cases": found}
    )
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
