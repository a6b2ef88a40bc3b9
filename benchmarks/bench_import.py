"""The memory of importing Meta's layout: peak RssAnon of `llamaweft model convert`, from outside.

    python -m benchmarks.bench_import --layers 1 --shards 1 2

A model as wide as Llama 3 8B and with its vocabulary, of few layers: what is held at a time is a
part of one tensor, so the number of layers changes the time and not the peak. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.contender import ROOT, Peak
from benchmarks.models import llama3_tokenizer
from llamaweft.errors import RunError
from llamaweft.model.presets import PRESETS
from llamaweft.runtime import cache_dir

SHAPE = PRESETS["llama3-8b"]
PARAMS = {
    "dim": SHAPE.hidden_size,
    "n_heads": SHAPE.num_attention_heads,
    "n_kv_heads": SHAPE.num_key_value_heads,
    "vocab_size": SHAPE.vocab_size,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": SHAPE.rms_norm_eps,
    "rope_theta": SHAPE.rope_theta,
}


def write_meta(folder: Path, layers: int, shards: int) -> int:
    """Random bf16 weights, a shard at a time; returns their bytes."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_layers": layers}))
    shutil.copy(llama3_tokenizer(), folder / "tokenizer.model")
    hidden, inner, vocab = SHAPE.hidden_size, SHAPE.intermediate_size // shards, SHAPE.vocab_size
    q, kv = hidden // shards, SHAPE.num_key_value_heads * SHAPE.head_dim // shards
    layer = {
        "attention.wq.weight": (q, hidden),
        "attention.wk.weight": (kv, hidden),
        "attention.wv.weight": (kv, hidden),
        "attention.wo.weight": (hidden, q),
        "feed_forward.w1.weight": (inner, hidden),
        "feed_forward.w2.weight": (hidden, inner),
        "feed_forward.w3.weight": (inner, hidden),
        "attention_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
    }
    shapes = {"tok_embeddings.weight": (vocab // shards, hidden)}
    for index in range(layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= {"norm.weight": (hidden,), "output.weight": (vocab // shards, hidden)}
    total = 0
    for shard in range(shards):
        tensors = {n: torch.empty(s, dtype=torch.bfloat16).normal_() for n, s in shapes.items()}
        total += sum(tensor.nbytes for tensor in tensors.values())
        torch.save(tensors, folder / f"consolidated.{shard:02d}.pth")
    return total


def convert(source: Path, target: Path) -> tuple[Peak, float]:
    """The peaks of the command, and its seconds. Raises RunError where it fails."""
    command = [sys.executable, "-m", "llamaweft", "model", "convert", str(source), str(target)]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    with Peak(process.pid) as peak:
        _, said = process.communicate()
    if process.returncode:
        raise RunError(said.strip().splitlines()[-1])
    return peak, time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_import")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench")
    args = parser.parse_args()
    work = args.work / "import"
    for shards in args.shards:
        shutil.rmtree(work, ignore_errors=True)
        try:
            size = write_meta(work / "meta", args.layers, shards)
            peak, seconds = convert(work / "meta", work / "converted")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        found = {
            "shards": shards,
            "layers": args.layers,
            "gigabytes": size / 1e9,
            "peak_anon_bytes": peak.anon_bytes,
            "seconds": seconds,
        }
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
