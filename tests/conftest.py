"""Shared pieces: a tiny random model with the embedded model's tokenizer, and small data."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for the stores that tests make, with the models that every run shares."""
    from llamaweft.runtime import cache_dir

    shared = cache_dir() / "models"
    shared.mkdir(parents=True, exist_ok=True)
    cache = tmp_path_factory.mktemp("cache")
    (cache / "models").symlink_to(shared)
    before = os.environ.get("LLAMAWEFT_CACHE")
    os.environ["LLAMAWEFT_CACHE"] = str(cache)
    yield
    if before is None:
        del os.environ["LLAMAWEFT_CACHE"]
    else:
        os.environ["LLAMAWEFT_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: two layers, four heads, two key-value heads, random fp32 weights."""
    from llamaweft.model.init import init_random

    folder = tmp_path_factory.mktemp("models") / "tiny"
    init_random("tiny", folder, "builtin:smollm2-135m", "fp32", seed=1)
    return folder


@pytest.fixture(scope="session")
def tied_folder(tiny_folder: Path, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one matrix for embedding and head."""
    from dataclasses import replace

    import torch

    from llamaweft.model.folder import read_config
    from llamaweft.model.init import random_tensors
    from llamaweft.model.save import write_model

    folder = tmp_path_factory.mktemp("models") / "tied"
    folder.mkdir()
    config = replace(read_config(tiny_folder), tie_word_embeddings=True)
    tensors, dtype = random_tensors(config, seed=1), torch.float32
    write_model(folder, config, tensors, tokenizer.save_pretrained, dtype=dtype)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded model's tokenizer: ChatML, no begin-of-text token."""
    from llamaweft.model.tokenizer import load_tokenizer

    return load_tokenizer("builtin:smollm2-135m")


CITIES = ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Quito", "Delhi", "Seoul", "Bern", "Accra"]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Thirty chats of different lengths, each different."""
    path = tmp_path / "chats.jsonl"
    lines = []
    for index in range(30):
        city = CITIES[index % len(CITIES)]
        question = f"Question {index}: what do you like about {city}?" + " Say more." * (index % 4)
        answer = f"I like the streets of {city}." + f" And the {index} bridges." * (index % 3)
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


SIX_SHORT_STEPS = {
    "learning_rate": 1e-2,
    "max_steps": 6,
    "micro_batch_tokens": 256,
    "gradient_accumulation_steps": 2,
    "checkpoint_every_steps": 2,
}


@pytest.fixture
def recipe_tree(tiny_folder: Path, chats: Path, tmp_path: Path) -> dict:
    """A recipe that trains the tiny model for six short steps."""
    return {
        "model": str(tiny_folder),
        "data": {"train": [{"path": str(chats)}], "validation": {"fraction": 0.2}},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
        "base_weights": "fp32",
        "training": SIX_SHORT_STEPS | {"compute_dtype": "fp32", "device": "cpu"},
        "evaluation": {"every_steps": 3, "metrics": ["loss"], "max_new_tokens": 4},
        "output_dir": str(tmp_path / "run"),
    }


def write_recipe(tree: dict, path: Path) -> Path:
    """A recipe file; JSON is YAML."""
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


@pytest.fixture
def command(tmp_path: Path, monkeypatch, capsys):
    """Runs a command in tmp_path as `llamaweft` does, without a process of its own: what it says
    on stdout, or, where it is refused, its one error."""
    from llamaweft.cli.app import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["llamaweft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.err
        if not code:
            return said.out
        (line,) = [line for line in said.err.splitlines() if line.startswith("error:")]
        return line

    return call
