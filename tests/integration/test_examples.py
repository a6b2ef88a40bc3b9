"""The examples run, and the recipes of the repository are valid."""

from __future__ import annotations

import json
import runpy
import sys
import zipfile
from pathlib import Path

import pytest

from llamaweft.recipe import Recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("recipes/*.yaml")), ids=lambda p: p.name)
def test_recipes_are_valid(path: Path) -> None:
    recipe = Recipe.load(path)
    assert f"llamaweft train recipes/{path.name}" in path.read_text(encoding="utf-8")
    assert Recipe.load_text(recipe.dump()) == recipe


def test_the_library_example_learns_its_answer(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples/fine_tune.py"))
    assert example["main"](tmp_path) == "We open at nine."


def test_slots_are_tagged_where_the_sentence_names_them() -> None:
    tagged = runpy.run_path(str(ROOT / "examples/slot_rows.py"))["tagged"]
    row = tagged(
        "Set the living room lamp to 40%", {"area": "living room", "brightness": 40, "x": 1}
    )
    assert row["tokens"][2:4] == ["living", "room"]
    assert row["tags"] == ["O", "O", "B-area", "I-area", "O", "O", "B-brightness"]


def test_rows_of_the_evals_wheel(tmp_path: Path, monkeypatch) -> None:
    """Every question on a story is on the same side, and a span is where the answer was said
    last."""
    example = runpy.run_path(str(ROOT / "examples/evals_rows.py"))
    stories = [
        {
            "input": [{"role": "user", "content": f"The cap is in box {i}. A box. {question}"}],
            "ideal": "box",
        }
        for i in range(40)
        for question in ("Where is the cap?", "Where was the cap?")
    ]
    titles = [{"input": [{"content": f"About {i}."}], "ideal": f"Title {i}"} for i in range(40)]
    with zipfile.ZipFile(tmp_path / "evals.whl", "w") as wheel:
        for name, rows in (
            ("theory_of_mind/tomi/test", stories),
            ("abstract2title/samples", titles),
        ):
            wheel.writestr(f"evals/registry/data/{name}.jsonl", "\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", ["evals_rows.py", str(tmp_path / "evals.whl"), str(tmp_path)])
    example["main"]()
    sides = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("stories-train", "stories-test", "titles-train", "titles-test")
    }
    contexts = [{row["context"] for row in sides[f"stories-{side}"]} for side in ("train", "test")]
    assert not contexts[0] & contexts[1]
    assert all(contexts)
    assert sum(len(rows) for rows in sides.values()) == 120
    for row in sides["stories-test"]:
        (start,) = row["answers"]["answer_start"]
        assert row["context"][start:] == "box."
        assert row["question"].startswith("Where")
    assert sides["titles-test"][0]["document"].startswith("About")
