"""The import arrows of the house, and what keeps its rooms habitable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llamaweft"

ALLOWED = {
    "errors": set(),
    "files": set(),
    "prefixes": set(),
    "shown": set(),
    "templates": set(),
    "provenance": set(),
    "recipe": {"settings"},
    "settings": set(),
    "runtime": set(),
    "weights": {"runtime"},
    "model": {"runtime", "weights", "prefixes"},
    "adapters": {"runtime", "weights"},
    "data": {"runtime", "prefixes", "templates"},
    "plan": {"recipe", "runtime", "model.presets", "parallel.layout", "weights.codecs"},
    "parallel": {"recipe", "settings", "runtime", "model.presets"},
    "train": {"runtime", "parallel"},
    "generate": {"model", "runtime", "prefixes", "templates"},
    "evaluate": {"generate", "data", "runtime", "templates"},
    "export": {"model", "weights", "adapters", "generate", "runtime"},
    "pieces": {"parallel", "provenance", "recipe", "runtime", "weights", "model", "adapters", "data", "plan", "train"},
    "planning": {"pieces", "parallel", "recipe", "runtime", "model", "weights", "plan"},
    "jobs": {"data", "model", "parallel.layout", "pieces", "plan", "planning", "recipe"},
    "layouts": {"parallel", "pieces", "plan", "planning", "recipe"},
    "forgetting": {"pieces", "evaluate", "model"},
    "judge": {"data", "evaluate", "model", "parallel", "recipe", "train"},
    "measuring": {"data", "evaluate", "model", "parallel", "pieces", "recipe", "settings", "train"},
    "pipeline": {
        "forgetting", "judge", "measuring", "parallel", "pieces", "planning", "recipe", "settings", "runtime", "weights", "model", "adapters", "data", "plan", "train",
        "generate", "evaluate", "export",
    },
    "exports": {"pipeline", "export", "adapters", "data", "model", "plan", "runtime"},
    "subject": {
        "pipeline", "pieces", "recipe", "settings", "runtime", "weights", "model", "adapters", "data", "plan", "train",
        "generate", "evaluate", "export", "exports",
    },
    "sweep": {"judge", "pipeline", "recipe", "plan", "train", "evaluate"},
    "verify": {"pieces", "sweep", "pipeline", "judge", "model", "plan", "recipe", "runtime", "train"},
    "predictions": {"subject", "pipeline", "model", "data", "generate", "evaluate"},
    "harness_run": {"subject", "pipeline", "evaluate", "data", "model", "prefixes"},
}  # fmt: skip


def _imports(path: Path) -> list[str]:
    """Dotted names below llamaweft that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            found.append(node.module or "")
    return [name for name in found if name.startswith("llamaweft.")]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_go_down_only(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = parts[0]
    if room in ("cli", "__main__", "__init__"):
        return
    for imported in _imports(path):
        target = imported.removeprefix("llamaweft.")
        inside = target.split(".")[0] == room
        allowed = any(target == a or target.startswith(f"{a}.") for a in ALLOWED[room])
        assert inside or allowed or target in ("errors", "files", "shown"), (
            f"{path} imports {imported}"
        )


def test_every_room_has_its_arrows() -> None:
    rooms = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in FILES}
    assert rooms - {"cli", "__main__", "__init__"} <= ALLOWED.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_longer_than_600_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def test_no_catch_all_rooms() -> None:
    assert not {"utils", "helpers", "common", "misc"} & {path.stem for path in FILES}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*/__init__.py")), ids=str)
def test_rooms_reexport_nothing(path: Path) -> None:
    assert not _imports(path)
