"""A flipped bit in any file of a run is found, or changes nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from flips import Flipping

READ = [
    *("recipe.yaml", "metrics.jsonl", "evaluation.json", "audit.json"),
    *("adapter_model.safetensors", "adapter_config.json"),
    *("trained.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"),
]
"""Files whose damage cannot be mended, so that it must be named."""


@pytest.fixture(scope="module")
def flipping(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flipping]:
    before = os.environ["LLAMAWEFT_CACHE"]
    yield Flipping(tmp_path_factory.mktemp("flips"), tiny_folder)
    os.environ["LLAMAWEFT_CACHE"] = before


@pytest.mark.slow
def test_a_bit_flipped_in_any_file_is_found_or_harmless(flipping: Flipping) -> None:
    found = flipping(1, seed=0).by_file
    assert all(found[name] for name in READ), found


@pytest.mark.parametrize(
    "name",
    [
        "adapter/adapter_model.safetensors",
        "recipe.yaml",
        "checkpoints/step-000004/trained.safetensors",
    ],
)
def test_a_flipped_bit_is_named(flipping: Flipping, name: str) -> None:
    before = flipping.figures.found
    flipping._try(flipping.run / name, random.Random(name))
    assert flipping.figures.found == before + 1


def test_damaged_prepared_rows_are_prepared_again(flipping: Flipping) -> None:
    """With the same result, which is compared."""
    (ids,) = (flipping.folder / "cache").rglob("ids.bin")
    flipping._try(ids, random.Random(0))
