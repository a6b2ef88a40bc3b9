"""A checkpoint of another run, or one made by hand with checksums that fit: it is told, and nothing of
it is used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llamaweft.errors import UserError
from llamaweft.train.checkpoint import (
    CHECKSUMS,
    LoopState,
    Snapshot,
    load_checkpoint,
    random_state,
    save_checkpoint,
)
from llamaweft.train.misfit import check_fits

KEPT = {"a": torch.ones(3, 2), "b": torch.ones(4)}
MOMENTS = {f"a:{name}": torch.zeros(3, 2) for name in ("exp_avg", "exp_avg_sq")}
MOMENTS["a:step"] = torch.tensor(7.0)
SOUND = Snapshot(LoopState(7), KEPT, MOMENTS)


def check(snapshot: Snapshot) -> None:
    check_fits(snapshot, Path("step-000007"), kept=KEPT, trained={"a": KEPT["a"]}, total_steps=10)


def test_a_checkpoint_of_the_run_fits() -> None:
    check(SOUND)
    check(replace(SOUND, optimizer={}))  # before the first step
    began = replace(SOUND, gradients={"a": torch.ones(3, 2)}, random_at_start=random_state())
    check(began)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trained": {"a": KEPT["a"]}}, "b is in one of them only"),
        ({"trained": KEPT | {"c": torch.ones(1)}}, "c is in one of them only"),
        ({"trained": KEPT | {"a": torch.ones(1)}}, r"a has the shape \(1,\), not \(3, 2\)"),
        ({"trained": KEPT | {"b": torch.ones(4, dtype=torch.bfloat16)}}, "b holds torch.bfloat16"),
        ({"gradients": {"b": torch.ones(4)}}, "a gradient of b, which is not trained"),
        ({"gradients": {"a": torch.ones(3)}}, r"a has the shape \(3,\)"),
        ({"gradients": {"a": torch.ones(3, 2)}}, "not the random state that their step began with"),
        ({"optimizer": MOMENTS | {"b:exp_avg": torch.ones(4)}}, "a moment of b, which is not trained"),
        ({"optimizer": MOMENTS | {"a:exp_avg": torch.ones(2)}}, r"a:exp_avg has the shape \(2,\)"),
        ({"optimizer": MOMENTS | {"a:exp_avg": torch.ones(3, 2, dtype=torch.int8)}}, "a:exp_avg holds torch.int8"),
        ({"optimizer": MOMENTS | {"a:step": torch.ones(3)}}, "a:step is no number"),
        ({"optimizer": {"a:step": torch.tensor(7.0)}}, "its optimizer has step alone of a"),
        ({"state": LoopState(11)}, "it is at step 11 of 10"),
        ({"state": LoopState(-1)}, "it is at step -1 of 10"),
        ({"state": LoopState(7, packs_done=-1)}, "counts below 0"),
    ],
)  # fmt: skip
def test_one_that_is_not_is_told(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=f"step-000007 is none of this run: .*{words}"):
        check(replace(SOUND, **changes))


def made_by_hand(folder: Path, name: str, content: bytes) -> Path:
    """A checkpoint with another file in it, and checksums that fit."""
    saved = save_checkpoint(folder, SOUND, keep=1)
    (saved / name).write_bytes(content)
    sums = json.loads((saved / CHECKSUMS).read_text())
    sums[name] = hashlib.sha256(content).hexdigest()
    (saved / CHECKSUMS).write_text(json.dumps(sums))
    return saved


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"step": "7"},
        {"step": 7.5},
        {"step": True},
        {"step": 7, "before": []},
        {"step": 7, "best_value": "low"},
        {"step": 7, "guard": {"returns": None}},
        {"step": 7, "guard": []},
        {"step": 7, "os": "system"},
        {"step": 7, "over_budget": "yes"},
    ],
)
def test_a_state_that_makes_no_sense_is_one_sentence(state: object, tmp_path: Path) -> None:
    folder = made_by_hand(tmp_path, "state.json", json.dumps(state).encode())
    with pytest.raises(UserError, match="cannot be read") as refused:
        load_checkpoint(folder)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.full((3,), float("inf")), torch.ones(0)])
@pytest.mark.parametrize("name", ["torch", "python", "numpy", "numpy_rest"])
def test_a_random_state_that_is_none_is_one_sentence(
    name: str, wrong: torch.Tensor, tmp_path: Path
) -> None:
    save_file(random_state() | {name: wrong}, tmp_path / "rng")
    folder = made_by_hand(tmp_path / "run", "rng.safetensors", (tmp_path / "rng").read_bytes())
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(folder)
    torch.set_rng_state(before)
