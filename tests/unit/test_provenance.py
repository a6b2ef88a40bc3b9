"""What environment.json says of a run is enough to make its environment again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llamaweft.pipeline import Pipeline
from llamaweft.provenance import hub_commit, installed, model_files, provenance, sbom
from llamaweft.recipe import Recipe


def imported() -> set[str]:
    """The distributions that the modules of this process come from, as their own records say."""
    by_module = metadata.packages_distributions()
    tops = {name.partition(".")[0] for name in sys.modules}
    return {name for top in tops for name in by_module.get(top, ())} - {"llamaweft"}


@pytest.fixture
def said(recipe_tree: dict) -> dict:
    """The environment of a run, as its file has it."""
    recipe = Recipe.validate_tree(recipe_tree)
    return json.loads(json.dumps(Pipeline(recipe).environment(recipe.dump())))


def test_every_distribution_that_was_imported_is_listed(said: dict) -> None:
    names = imported()
    assert {"torch", "transformers", "numpy", "pydantic"} <= names
    required = {Requirement(line).name for line in said["rebuild"]["requirements"]}
    components = {one["name"] for one in said["sbom"]["components"]}
    for found in (said["packages"].keys(), required, components):
        assert not names - set(found)
    for name in names:
        assert said["packages"][name] == metadata.version(name)


def test_the_lines_for_pip_are_exact(said: dict) -> None:
    for line in said["rebuild"]["requirements"]:
        wanted = Requirement(line)
        assert wanted.url or [clause.operator for clause in wanted.specifier] == ["=="], line


def test_the_run_is_named_to_the_byte(said: dict, recipe_tree: dict, tiny_folder: Path) -> None:
    again = said["rebuild"]
    recipe = Recipe.validate_tree(recipe_tree)
    assert again["recipe_sha256"] == hashlib.sha256(recipe.dump().encode()).hexdigest()
    files = {file["name"]: file for file in again["model_files"]}
    content = (tiny_folder / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == {
        "name": "model.safetensors",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (held,) = again["data"].values()
    path = Path(recipe_tree["data"]["train"][0]["path"])
    path.write_text(path.read_text().replace("Paris", "Parma"))
    (other,) = Pipeline(recipe).environment(recipe.dump())["rebuild"]["data"].values()
    assert held != other
    assert (said["seed"], again["python"]) == (0, sys.version.split()[0])
    assert said["torch"] == said["packages"]["torch"]  # what was there before is there still
    assert "cpu_flags" in said
    assert "Build settings" in said["torch_build"] or "PyTorch" in said["torch_build"]


def test_the_list_of_parts_has_the_form_of_cyclonedx(said: dict) -> None:
    parts = said["sbom"]
    assert (parts["bomFormat"], parts["specVersion"]) == ("CycloneDX", "1.5")
    references = [one["bom-ref"] for one in parts["components"]]
    assert len(references) == len(set(references))
    for one in parts["components"]:
        assert one["type"] in ("library", "machine-learning-model")
        if one["type"] == "library":
            assert one["purl"].startswith("pkg:pypi/")
            assert one["purl"].partition("@")[0] == one["purl"].partition("@")[0].lower()
    (model,) = [one for one in parts["components"] if one["type"] == "machine-learning-model"]
    assert {"config.json", "model.safetensors"} <= {file["name"] for file in model["components"]}
    assert json.loads(json.dumps(sbom([], "m", [])))["components"][0]["name"] == "m"


def test_it_does_not_slow_the_start(tiny_folder: Path) -> None:
    began = time.process_time()
    provenance(recipe_text="", seed=0, commit="", model="m", folder=tiny_folder, sources={})
    assert time.process_time() - began < 1.5  # 0.5 s on an idle machine; docs/security.md
    assert len(installed()) > 50


def test_a_model_of_the_hub_has_its_commit_and_its_checksums(tmp_path: Path) -> None:
    digest, commit = "ab" * 32, "cd" * 20
    folder = tmp_path / "models--a--b" / "snapshots" / commit
    folder.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / f"models--a--b/blobs/{digest}").write_bytes(b"x" * 10)
    os.symlink(f"../../blobs/{digest}", folder / "model.safetensors")
    assert model_files(folder) == [{"name": "model.safetensors", "bytes": 10, "sha256": digest}]
    assert hub_commit(folder) == commit
    assert hub_commit(tmp_path) is None


def test_a_large_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamaweft.provenance.HASHED_BYTES", 9)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    assert model_files(tmp_path) == [{"name": "model.safetensors", "bytes": 10, "sha256": None}]
