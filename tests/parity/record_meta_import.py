"""Records what transformers' own script makes of small folders in Meta's layout: the SHA-256 of
every tensor, and the config. Newer wheels no longer have the script, so this runs beside an
older one, and tests/parity/test_meta_import.py compares with what it wrote:

    pip install --target /tmp/transformers4 'transformers==4.47.1'
    PYTHONPATH=/tmp/transformers4:tests python tests/parity/record_meta_import.py
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from meta_folder import TINY, write_meta
from safetensors.torch import load_file

RECORD = Path(__file__).with_name("meta_import.json")

LLAMA3 = TINY | {"rope_theta": 500000.0, "n_kv_heads": 2}
CASES = {
    "llama1": ("1", TINY | {"norm_eps": 1e-06, "vocab_size": -1}, 96, {}),
    "llama2, two shards": ("2", TINY | {"vocab_size": -1}, 96, {"shards": 2, "embedding_side": 1}),
    "code llama": ("2", TINY | {"rope_theta": 1000000, "n_kv_heads": 2}, 96, {}),
    "llama3, four shards": (
        "3",
        LLAMA3 | {"n_heads": 8, "n_kv_heads": 4, "vocab_size": 128256, "dim": 16},
        128256,
        {"shards": 4},
    ),
    "llama3.1": (
        "3.1",
        LLAMA3 | {"use_scaled_rope": True, "ffn_dim_multiplier": 1.3, "vocab_size": 96},
        96,
        {},
    ),
    "llama3.2, tied": (
        "3.2",
        LLAMA3 | {"use_scaled_rope": True, "ffn_dim_multiplier": 1.5, "vocab_size": 96},
        96,
        {"tied": True},
    ),
}
"""Version, params.json, rows of the embedding, how it is sliced."""

KEYS = (
    "architectures",
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
)


def digests(folder: Path) -> dict[str, str]:
    """dtype, shape and SHA-256 of every tensor of a Hugging Face folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            shape = "x".join(map(str, tensor.shape))
            found[name] = f"{tensor.dtype} {shape} {hashlib.sha256(raw).hexdigest()}"
    return dict(sorted(found.items()))


def main() -> None:
    import transformers
    from transformers.models.llama.convert_llama_weights_to_hf import write_model

    record: dict[str, object] = {"transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as place:
        for case, (version, params, vocab, slices) in CASES.items():
            source = write_meta(Path(place) / f"{case} source", params, vocab, **slices)
            target = Path(place) / case
            write_model(
                str(target),
                str(source),
                llama_version=version,
                vocab_size=vocab,
                num_shards=slices.get("shards", 1),
                instruct=True,
            )
            config = json.loads((target / "config.json").read_text())
            record[case] = {
                "config": {key: config.get(key) for key in KEYS},
                "tensors": digests(target),
            }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
