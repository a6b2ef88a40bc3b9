"""What travels with a job: the recipe, what it names on this machine, this package and the exact
versions of what it needs. In the job's folder every local path is one below it, so that the folder
can be copied, mounted or put into an image as a whole.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from ruamel.yaml import YAML

import llamaweft
from llamaweft.data.places import files
from llamaweft.errors import UserError
from llamaweft.files import need_disk, write_text
from llamaweft.model.builtin import BUILTIN
from llamaweft.recipe import Recipe

_ADDRESS = re.compile(r"(?!file://)[A-Za-z][A-Za-z0-9+.-]*://|builtin:")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass
class Carried:
    """text: the recipe with its paths below the job's folder. copies: place in that folder -> file
    or folder here. requirements: lines for pip; alone: those that are installed without what they
    require in turn."""

    text: str = ""
    copies: dict[str, Path] = field(default_factory=dict)
    requirements: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Size of what is copied."""
        return sum(file.stat().st_size for path in self.copies.values() for file in _files(path))


def carry(recipe: Recipe) -> Carried:
    """Raises UserError for a place that is not there, and for a metric of the user's own, whose
    module no job could import."""
    carried = Carried()
    tree = YAML(typ="safe", pure=True).load(recipe.dump())
    data = tree["data"]
    own = [name for name in recipe.evaluation.metrics if ":" in name]
    if own:
        raise UserError(
            f"evaluation.metrics: {own[0]} is a module of your own, which a job does not carry; "
            "measure it afterwards with `llamaweft evaluate`"
        )
    for rows in [*data["train"], data["validation"] or {}]:
        if isinstance(path := rows.get("path"), list):
            rows["path"] = [_carried(carried, "data", one) for one in path]
        elif path is not None:
            rows["path"] = _carried(carried, "data", path)
    for step in data["clean"]:
        if step.get("against", "validation") != "validation":
            step["against"] = _carried(carried, "data", step["against"])
    for section, key in ((tree, "model"), (tree["adapter"], "init_from"), (data, "chat_template")):
        if (name := section.get(key)) and not _ADDRESS.match(name) and Path(name).exists():
            section[key] = _add(carried, key, Path(name))
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = False, 2**31
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(tree, stream)
    carried.text = stream.getvalue()
    carried.requirements, carried.alone = _requirements(recipe)
    return carried


def _carried(carried: Carried, folder: str, place: str) -> str:
    """Where the files of a place will be; an address, and what comes with a package, stays."""
    if _ADDRESS.match(place):
        return place
    found = [file.path for file in files(place)]
    if len(found) == 1:
        return _add(carried, folder, found[0])
    root = Path(os.path.commonpath([path.parent for path in found]))
    target = f"{folder}/{len(carried.copies)}"
    carried.copies |= {f"{target}/{path.relative_to(root)}": path for path in found}
    return target


def _add(carried: Carried, folder: str, path: Path) -> str:
    """A name of its own for a file or folder, with its ending, which says how it is read."""
    name = path.resolve().name
    plain = name if _NAME.fullmatch(name) else f"file{''.join(path.suffixes)}"
    target = f"{folder}/{len(carried.copies)}-{plain}"
    carried.copies[target] = path
    return target


def write_carried(carried: Carried, folder: Path) -> None:
    """Raises UserError where the disk has no room."""
    need_disk(folder, carried.bytes, "the job with its data")
    write_text(folder / "recipe.yaml", carried.text)
    write_text(folder / "requirements.txt", "".join(f"{line}\n" for line in carried.requirements))
    if carried.alone:
        write_text(folder / "requirements-alone.txt", "".join(f"{r}\n" for r in carried.alone))
    package = Path(llamaweft.__file__).parent
    shutil.copytree(package, folder / "llamaweft", ignore=shutil.ignore_patterns("__pycache__"))
    for target, source in carried.copies.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / target)


def _files(path: Path) -> Iterator[Path]:
    yield from (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _requirements(recipe: Recipe) -> tuple[list[str], list[str]]:
    """What the package needs, in the versions that are installed here, and what this recipe needs
    beside that. torch without its local version: the index's build for Linux has CUDA."""
    try:
        lines = metadata.requires("llamaweft") or []
    except metadata.PackageNotFoundError:
        raise UserError(
            "llamaweft is not installed, so nothing says what it needs; run `pip install -e .`"
        ) from None
    plain = [line for line in lines if "extra ==" not in line]
    names = [re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] for line in plain]
    wanted = sorted({*names, *_extras(recipe)}, key=str.lower)
    builtin = BUILTIN.get(recipe.model)
    alone = [f"{builtin.distribution}=={builtin.version}"] if builtin else []
    return [_exact(name) for name in wanted], alone


def _extras(recipe: Recipe) -> Iterator[str]:
    """Packages that only some recipes need."""
    if recipe.training.optimizer == "adamw_8bit" or recipe.base_weights in ("nf4", "auto"):
        yield "bitsandbytes"
    yield from recipe.training.report_to
    metrics = " ".join(recipe.evaluation.metrics)
    if "rouge" in metrics:
        yield "rouge-score"
    if "bleu" in metrics or "chrf" in metrics:
        yield "sacrebleu"
    steps = {step.step for step in recipe.data.clean}
    if "language" in steps:
        yield "py3langid"
    if "near_duplicates" in steps:
        yield "rensa"
    if "builtin:smart-home" in recipe.dump():
        yield from ("home-assistant-intents", "hassil")


def _exact(name: str) -> str:
    try:
        return f"{name}=={metadata.version(name).partition('+')[0]}"
    except metadata.PackageNotFoundError:
        return name
