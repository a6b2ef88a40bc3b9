"""Data that tries to act on a terminal, a page of Markdown or a file of somebody else: it is shown as
text, and opens nothing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import SIX_SHORT_STEPS, write_recipe
from markdown_it import MarkdownIt
from said import all_said

EVIL = (
    "\x1b]0;owned\x07\x1b[31mred\x1b[0m \x9b2J [red]markup[/red] [link=file:///etc]x[/] \u202egnp.exe "
    "<script>alert(1)</script> [a](javascript:alert(1)) ![i](http://host/track.png) | a | b | \x08\x08"
)
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def evil(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose rows, file and run have evil names and contents."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"{EVIL} number {n} " + "word " * (n % 5), "label": f"{EVIL} {n % 2}"}
        for n in range(24)
    ]
    data = tmp_path / "\x1b[31m<img src=x onerror=alert(1)>[red]a.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    tree = {
        "model": str(tiny_folder),
        "task": "sequence_classification",
        "data": {"train": [{"path": str(data)}], "validation": {"fraction": 0.3}},
        "audit": {"allow": ["validation_leak"]},
        "adapter": {"r": 2},
        "base_weights": "fp32",
        "training": SIX_SHORT_STEPS | {"max_steps": 2, "compute_dtype": "fp32"},
        "evaluation": {"every_steps": None, "metrics": ["loss", "accuracy"]},
        "output_dir": str(tmp_path / "run [red] [bold <img src=x onerror=alert(2)> \x1b[0m"),
    }
    return write_recipe(tree, tmp_path / "recipe.yaml")


def said_of(monkeypatch, capsys, *arguments: object, code: int = 0) -> str:
    """What a command says, in which no character acts on a terminal."""
    found, said = all_said(monkeypatch, capsys, *arguments)
    assert found == code, said
    assert not CONTROL.search(said), repr(said[:3000])
    return said


def test_no_control_character_of_data_reaches_the_terminal(evil: Path, monkeypatch, capsys) -> None:
    said = said_of(monkeypatch, capsys, "data", "show", evil)
    assert "[red]markup[/red]" in said  # as it was written
    assert "␛]0;owned" in said
    said_of(monkeypatch, capsys, "data", "show", evil, "--json")
    said_of(monkeypatch, capsys, "data", "audit", evil)
    json.loads(said_of(monkeypatch, capsys, "data", "audit", evil, "--json"))
    said_of(monkeypatch, capsys, "train", evil)
    run = json.loads(evil.read_text())["output_dir"]
    said_of(monkeypatch, capsys, "evaluate", run)
    said_of(monkeypatch, capsys, "train", evil, code=2)  # the folder holds a run, and is named
    said_of(monkeypatch, capsys, "train", evil, "data.train=\x1b[31mnone.jsonl", code=2)
    (evil.parent / "broken.jsonl").write_text('{"text": "\x1b[31m')
    said_of(monkeypatch, capsys, "data", "audit", evil, "data.train=broken.jsonl", code=2)


def test_names_in_titles_and_columns_are_no_markup(capsys) -> None:
    from llamaweft.cli.terminal import facts, out, table

    out.print(table("[/red] title", "[bold]column"))
    out.print(facts("[red]title[/red]", {"[/a]": "[link=x]"}))
    said = "".join(capsys.readouterr().out.split())  # however lines are broken
    for name in ("[/red] title", "[bold]column", "[red]title[/red]", "[/a]", "[link=x]"):
        assert name.replace(" ", "") in said


def test_a_report_in_markdown_renders_as_text(evil: Path, monkeypatch, capsys) -> None:
    said_of(monkeypatch, capsys, "train", evil)
    (report,) = evil.parent.glob("run*/report.md")
    text = report.read_text(encoding="utf-8")
    assert not CONTROL.search(text.replace("\u202e", ""))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    flat = [token for one in tokens for token in (one, *(one.children or []))]
    assert not {"html_block", "html_inline", "link_open", "image"} & {token.type for token in flat}
    assert "<img src=x onerror=alert(2)>" in "".join(token.content for token in flat)


def test_a_row_that_names_a_file_opens_none(
    tiny_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    bait = tmp_path / "bait.txt"
    bait.write_text("bait")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"file://{bait} number {n}"},
                {"role": "assistant", "content": str(bait)},
            ],
            "image": str(bait),
            "path": str(bait),
            "file_name": f"../{bait.name}",
            "__file__": str(bait),
        }
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree = {"model": str(tiny_folder), "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]}}
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    opened: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple) -> None:
        if watching[0] and event in ("open", "os.listdir", "os.scandir") and arguments:
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    try:
        all_said(monkeypatch, capsys, "data", "audit", recipe, "--html", tmp_path / "a.html")
    finally:
        watching[0] = False
    assert str(tmp_path / "rows.jsonl") in opened
    assert not [name for name in opened if bait.name in name]
