"""The run folder: what a run leaves behind, and the lock that keeps a second run out."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any, TextIO

from llamaweft.errors import UserError
from llamaweft.files import write_text


class RunFolder:
    """Paths inside an `output_dir`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.environment = root / "environment.json"
        self.audit = root / "audit.json"
        self.plan = root / "plan.json"
        self.metrics = root / "metrics.jsonl"
        self.quarantine = root / "quarantine.jsonl"
        self.checkpoints = root / "checkpoints"
        self.adapter = root / "adapter"
        self.model = root / "model"
        self.evaluation = root / "evaluation.json"
        self.forgetting = root / "forgetting.safetensors"
        self.general_answers = root / "general_answers.jsonl"
        self.report_md = root / "report.md"
        self.report_html = root / "report.html"
        self._lock: TextIO | None = None

    def record_answers(self, step: int, answers: list[dict[str, Any]]) -> None:
        """Write the answers to general prompts at an evaluation; those of later steps, which a
        resumed run comes to again, go."""
        lines = read_lines(self.general_answers)
        kept = [line for line in lines if line["step"] < step]
        text = "".join(
            json.dumps(line, ensure_ascii=False) + "\n"
            for line in [*kept, {"step": step, "answers": answers}]
        )
        write_text(self.general_answers, text)

    @property
    def growing(self) -> list[Path]:
        """Files that have a checksum once the run is over."""
        return [self.metrics, self.quarantine, self.general_answers, self.evaluation]

    @property
    def holds_run(self) -> bool:
        return self.recipe.exists()

    def check_free(self, resume: bool) -> None:
        """Raises UserError when the folder holds another run (without `resume`) or other files."""
        if self.holds_run and not resume:
            raise UserError(
                f"{self.root} holds another run; give another output_dir, or --resume to go on "
                "with it"
            )
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"output_dir {self.root} is a file; give a folder")
        strangers = [] if self.holds_run else sorted(p.name for p in self.root.glob("[!.]*"))
        if strangers:
            raise UserError(
                f"{self.root} holds other files ({strangers[0]}); give a new or empty output_dir"
            )

    def lock(self) -> None:
        """Take the folder, making it if need be; the lock dies with this process.

        Raises UserError when another process has it or it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = (self.root / ".lock").open("w")
        except OSError as error:
            raise UserError(f"output_dir {self.root} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise UserError(f"another process is running in {self.root}; wait or stop it") from None
        self._lock = handle

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file. A last line that a crash
    cut short is left out. Raises UserError for any other that is damaged."""
    text = text_of(path) if path.exists() else ""
    lines = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            if not line.endswith("\n"):
                break
            raise UserError(
                f"{path} line {number} is damaged: it is no JSON; remove the line, or take the "
                "file from a copy"
            ) from None
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. Raises UserError where it is
    damaged."""
    if not path.exists():
        return {}
    try:
        content = json.loads(text_of(path))
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; take it from a copy")
    return content


def text_of(path: Path) -> str:
    """The text of a file. Raises UserError where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is no UTF-8; take it from a copy") from None
