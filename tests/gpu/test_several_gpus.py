"""Several GPUs over NCCL learn what one GPU learns: the cases of tests/parallel on CUDA devices."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

PARALLEL = Path(__file__).parents[1] / "parallel"
sys.path.insert(0, str(PARALLEL))

from ranked import furthest, losses, run_cases, trained  # noqa: E402

from llamaweft.pipeline import Pipeline  # noqa: E402
from llamaweft.recipe import Recipe  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("layout", [{"data": 2}, {"shard": 2}, {"tensor": 2}], ids=json.dumps)
@pytest.mark.parametrize("method", ["lora", "none"])
def test_two_gpus_learn_what_one_learns(
    layout: dict[str, int], method: str, recipe_tree: dict, tmp_path: Path
) -> None:
    """In fp32; products are taken in another order, so 1e-4."""
    recipe_tree["adapter"] = {"method": method} | ({"r": 4} if method == "lora" else {})
    recipe_tree["training"] |= {"learning_rate": 1e-4, "adam_epsilon": 1e-6, "device": "cuda"}
    if method == "none":
        del recipe_tree["base_weights"]
    Pipeline(Recipe.validate_tree(recipe_tree | {"output_dir": str(tmp_path / "alone")})).train()
    run_cases(2, [{"recipe": recipe_tree, "layout": layout}], tmp_path)
    run, alone = tmp_path / "run", tmp_path / "alone"
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    assert furthest(trained(run), trained(alone))[0] < 1e-4
