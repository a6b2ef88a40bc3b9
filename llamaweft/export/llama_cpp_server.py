"""llama.cpp's own server on a GGUF file, in a process of its own: `python -m` this, with the
settings as JSON. It says its address and lives until its standard input is closed.

A process of its own, since llama.cpp ends the process for what it does not expect in a file.
"""

from __future__ import annotations

import json
import os
import sys

ADDRESS = "address "
KEY = "LLAMAWEFT_SERVER_KEY"
"""Environment variable with the key that every request must name."""


def main() -> None:
    import xllamacpp

    settings = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_ctx, params.n_parallel = settings["context_tokens"], 1
    # The buffer of logits that it sets aside is of n_ubatch rows.
    params.n_batch = params.n_ubatch = settings["batch_tokens"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.n_gpu_layers = 0
    # Keys and values in fp32 as they are computed, and weights from the file as they are.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_extra_bufts, params.warmup = True, False
    params.cache_ram_mib = 0
    params.hostnames, params.port, params.ui = ["127.0.0.1"], 0, False
    params.api_keys = [os.environ[KEY]]
    server = xllamacpp.Server(params)
    print(f"{ADDRESS}{server.listening_address}", flush=True)
    sys.stdin.read()
    os._exit(0)  # nothing of it is worth a farewell


if __name__ == "__main__":
    main()
