"""Who decodes: llamaweft and llama.cpp, each a process that generates once for each `go`.

python -m benchmarks.decoders '{"kind": "llamaweft", "model": ..., "codec": "nf4", ...}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.step_server import StepServer

THREADS = 2
PROMPT_TOKENS = 16


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Random token ids: speed does not depend on what they say."""
    random = np.random.default_rng(0)
    return random.integers(100, min(vocabulary, 100_000), (count, PROMPT_TOKENS)).tolist()


def llamaweft(settings: dict[str, Any]) -> Callable[[], tuple[int, float]]:
    """A function that decodes and returns (new tokens of all sequences, seconds)."""
    from llamaweft.generate.generate import Session
    from llamaweft.model.load import load_causal_lm

    torch.set_num_threads(THREADS)
    model = load_causal_lm(
        Path(settings["model"]), base_weights=settings["codec"], compute_dtype=torch.float32
    ).eval()
    given = prompts(settings["sequences"], model.config.vocab_size)

    @torch.inference_mode()
    def decode() -> tuple[int, float]:
        session = Session(model, len(given), PROMPT_TOKENS + settings["new_tokens"])
        ids_B = session.prefill(given).argmax(-1)
        began = time.perf_counter()
        for _ in range(settings["new_tokens"]):
            ids_B = session.decode(ids_B).argmax(-1)
        return len(given) * settings["new_tokens"], time.perf_counter() - began

    return decode


def llama_cpp(settings: dict[str, Any]) -> Callable[[], tuple[int, float]]:
    """The same by llama.cpp's own server code, in this process; the time is what it reports."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_ctx, params.n_parallel = 1024, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(params)
    (given,) = prompts(1, 128_000)

    def decode() -> tuple[int, float]:
        answer = server.handle_completions(
            {
                "prompt": given,
                "n_predict": settings["new_tokens"],
                "ignore_eos": True,
                "temperature": 0,
                "cache_prompt": False,
            }
        )
        timings = answer["timings"]
        return timings["predicted_n"], timings["predicted_ms"] / 1000

    return decode


def main() -> None:
    settings = json.loads(sys.argv[1])
    server = StepServer()
    decode = {"llamaweft": llamaweft, "llama.cpp": llama_cpp}[settings["kind"]](settings)
    going_on = True
    while going_on:
        tokens, seconds = decode()
        going_on = server.step_ended(new_tokens=tokens, decode_seconds=seconds)


if __name__ == "__main__":
    main()
