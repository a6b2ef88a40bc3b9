"""Any layout learns what one process learns: losses, and every trained weight after five steps.

fp32, learning rate 1e-4, packs with unequal numbers of trained tokens, four of them a step, a
gradient that is clipped, validations. Tolerance 1e-5: sums are taken in another order, and nothing
else differs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from byte_tokens import byte_tokenizer
from ranked import furthest, losses, run_cases, trained

from llamaweft.model.init import random_tensors
from llamaweft.model.presets import LlamaConfig
from llamaweft.model.save import write_model
from llamaweft.pipeline import Pipeline
from llamaweft.recipe import Recipe

TOLERANCE = 1e-5

LAYOUTS = {
    2: [{"data": 2}, {"shard": 2}, {"tensor": 2}],
    4: [
        {"data": 4},
        {"shard": 4},
        {"tensor": 4},
        {"data": 2, "shard": 2},
        {"data": 2, "tensor": 2},
        {"shard": 2, "tensor": 2},
    ],
}
TASKS = ("lora-nf4", "full", "classification")
MORE_TASKS = ("lora-int8-tied", "full-tied", "dora")
"""Held in parts by two ranks only: a matrix for both ends, and norms of whole rows."""

PAIRS = [(4, layout) for layout in LAYOUTS[4] if len(layout) == 2]
ALONE = [(4, layout) for layout in LAYOUTS[4] if len(layout) == 1]
TWO = [(2, layout) for layout in LAYOUTS[2]]
CASES = {
    "two": [(2, t, layout) for _, layout in TWO for t in TASKS]
    + [(2, task, {"shard": 2}) for task in MORE_TASKS],
    "pairs": [(4, task, layout) for _, layout in PAIRS for task in TASKS],
    "four": [(4, task, layout) for _, layout in ALONE for task in TASKS],
}


def name_of(layout: dict[str, int]) -> str:
    return "-".join(f"{name}{size}" for name, size in layout.items())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Models wide enough to be cut in four, with a head of their own and without."""
    found, tokenizer = {}, byte_tokenizer()
    for tied in (False, True):
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.06,  # so that attention is not the same everywhere
            tie_word_embeddings=tied,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        folder = tmp_path_factory.mktemp("models") / f"wide-{tied}"
        folder.mkdir()
        tensors = random_tensors(config, seed=3)
        write_model(folder, config, tensors, tokenizer.save_pretrained, dtype=torch.float32)
        found[tied] = folder
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Chats whose answers have very different lengths, and labelled texts."""
    folder = tmp_path_factory.mktemp("rows")
    chats, labelled = [], []
    for n in range(36):
        question = f"What is number {n}?" + " Tell me more." * (n % 5)
        answer = f"It is {n}." + f" So {n} and {n + 1} follow." * (n % 7)
        roles = zip(("user", "assistant"), (question, answer), strict=True)
        chats.append({"messages": [{"role": role, "content": text} for role, text in roles]})
        labelled.append({"text": question + answer, "label": ("odd" if n % 2 else "even")})
    for name, lines in (("chats", chats), ("labelled", labelled)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return {name: folder / f"{name}.jsonl" for name in ("chats", "labelled")}


def recipe_for(task: str, models: dict, rows: dict[str, Path], output_dir: Path) -> dict:
    method, _, rest = task.partition("-")
    classifies = task == "classification"
    tree = {
        "model": str(models[task.endswith("tied")]),
        "task": "sequence_classification" if classifies else "chat",
        "data": {
            "train": [{"path": str(rows["labelled" if classifies else "chats"])}],
            "validation": {"fraction": 0.25},
        },
        "adapter": {"method": "none"}
        if method == "full"
        else {"method": "dora" if task == "dora" else "lora", "r": 4, "lora_alpha": 8},
        "training": {
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0,
            "weight_decay": 0.1,
            "adam_epsilon": 1e-5,  # else the sign of what is rounding alone decides some updates
            "max_grad_norm": 0.5,
            "max_steps": 5,
            "micro_batch_tokens": 384,
            "gradient_accumulation_steps": 4,
            "checkpoint_every_steps": 3,
            "compute_dtype": "fp32",
            "device": "cpu",
            "memory_budget": "3GiB",
        },
        "evaluation": {"every_steps": 2, "metrics": ["loss"]},
        "output_dir": str(output_dir),
    }
    if method != "full":
        tree["base_weights"] = rest.partition("-")[0] or "fp32"
    return tree


@pytest.fixture(scope="module")
def trained_by(models: dict, rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Trains tasks by layouts, and by one process; returns their run folders."""
    folder = tmp_path_factory.mktemp("runs")

    def train(kind: str) -> Path:
        cases = []
        world = CASES[kind][0][0]
        for _, task, layout in CASES[kind]:
            alone = folder / f"{task}-alone"
            if not alone.exists():
                tree = recipe_for(task, models, rows, alone)
                Pipeline(Recipe.validate_tree(tree)).train()
            run = folder / f"{task}-{name_of(layout)}"
            cases.append({"recipe": recipe_for(task, models, rows, run), "layout": layout})
        run_cases(world, cases, folder)
        return folder

    return train


@pytest.mark.parametrize(
    "kind", ["two", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pairs", "four"))]
)
def test_a_layout_learns_what_one_process_learns(kind: str, trained_by) -> None:
    runs = trained_by(kind)
    for _, task, layout in CASES[kind]:
        ours, alone = runs / f"{task}-{name_of(layout)}", runs / f"{task}-alone"
        assert len(losses(ours)) == 5
        for record in ("train", "validation"):
            wanted = pytest.approx(losses(alone, record), rel=TOLERANCE)
            assert losses(ours, record) == wanted, ours.name
        far, name = furthest(trained(ours), trained(alone))
        assert far < TOLERANCE, f"{ours.name}: {name}"
