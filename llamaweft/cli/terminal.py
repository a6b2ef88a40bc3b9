"""What a person sees: tables on stdout, progress on stderr, or one JSON document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table

from llamaweft.shown import printable, redacted
from llamaweft.train.events import Ended, Event, Started, StepEnded, Validated


class SafeConsole(Console):
    """Shows what data holds as text: no control character of it reaches the terminal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:  # rich's own
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


out = SafeConsole(highlight=False)
err = SafeConsole(stderr=True, highlight=False)

_IN_JSON = {
    code: f"\\u{code:04x}"
    for code in (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}

JsonFlag = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout, all else on stderr.")
]


def print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False).translate(_IN_JSON))


def say(text: str) -> None:
    """A line about what is going on."""
    err.print(f"[dim]{escape(redacted(text))}[/dim]")


def table(title: str, *columns: str) -> Table:
    """Title and columns may be names of a user's own; they are no markup."""
    made = Table(
        title=escape(title), title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for column in columns:
        made.add_column(escape(column), overflow="fold")
    return made


def facts(title: str, rows: dict[str, Any]) -> Table:
    """A table of names and values."""
    made = table(title, "", "")
    made.show_header = False
    for name, value in rows.items():
        made.add_row(f"[cyan]{escape(name)}[/cyan]", escape(str(value)))
    return made


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """`3 h 20 min`, `4 min 5 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for something that tells (done, of all)."""
    with Progress(
        TextColumn(what), BarColumn(bar_width=20), MofNCompleteColumn(), console=err
    ) as p:
        task = p.add_task(what)
        yield lambda done, total: p.update(task, completed=done, total=total)


@contextmanager
def preparing(pipeline: Any) -> Iterator[None]:
    """A count on stderr of the rows that a pipeline prepares, gone when it is done."""
    with Progress(
        TextColumn("preparing rows"), TextColumn("{task.completed:,.0f}"), TimeElapsedColumn(),
        console=err, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=None)
        pipeline.on_rows = lambda rows: progress.update(task, completed=rows)
        pipeline.say = lambda what: progress.console.print(f"[dim]{escape(what)}[/dim]")
        yield


class TrainingProgress:
    """A listener and a counter of answers: bars on stderr with step, loss, rate, time left.

    Of several runs, `named` gives each a bar of its own. shown: whether anything is; of several
    ranks one is enough.
    """

    def __init__(self, *, shown: bool = True) -> None:
        self._shown = shown
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=err,
            disable=not shown,
        )
        self._training: dict[str, TaskID] = {}
        self._answers: TaskID | None = None
        self._rows: TaskID | None = None

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        if self._shown:
            self._progress.console.print(f"[dim]{escape(redacted(text))}[/dim]")

    def __call__(self, event: Event) -> None:
        self._told("training", event)

    def named(self, name: str) -> Callable[[Event], None]:
        """A listener of one run of several."""
        return lambda event: self._told(name, event)

    def _told(self, name: str, event: Event) -> None:
        of = "" if name == "training" else f"{name}: "
        match event:
            case Started():
                if self._rows is not None:
                    self._progress.remove_task(self._rows)
                    self._rows = None
                self._training[name] = self._progress.add_task(
                    name, total=event.total_steps, completed=event.step, note=""
                )
            case StepEnded() if name in self._training:
                note = f"loss {event.loss:.3f}  {event.tokens_per_second:.0f} tokens/s"
                self._progress.update(self._training[name], completed=event.step, note=note)
            case Validated():
                values = "  ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
                best = "  (best so far)" if event.best else ""
                self.say(f"{of}step {event.step} on held-out rows: {values}{best}")
            case Ended(reason=reason) if reason != "finished":
                self.say(f"{of}ended after step {event.step}: {reason}")

    def rows(self, done: int) -> None:
        """Told how many rows are prepared."""
        if self._rows is None:
            self._rows = self._progress.add_task("preparing rows", total=None, note="")
        self._progress.update(self._rows, completed=done)

    def answers(self, done: int, total: int) -> None:
        """Told how many answers of an evaluation are written."""
        if self._answers is None:
            self._answers = self._progress.add_task("answering", total=total, note="")
        self._progress.update(self._answers, completed=done, total=total)
        if done == total:
            self._progress.remove_task(self._answers)
            self._answers = None
