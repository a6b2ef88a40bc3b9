"""`llamaweft data show|audit`: rows as the model will see them, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from llamaweft.cli.terminal import JsonFlag, facts, out, preparing, print_json, say, table
from llamaweft.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Show rows as the model will see them, or audit them.",
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")]


@app.command()
def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="How many rows to show.", min=1)] = 3,
    start: Annotated[int, typer.Option(help="The first one, counted from 1.", min=1)] = 1,
    json_output: JsonFlag = False,
) -> None:
    """Training rows token by token: trained ones are green and underlined, context is dim."""
    from llamaweft.data.classes import label_names
    from llamaweft.pipeline import Pipeline

    pipeline = Pipeline(Recipe.load(recipe, overrides or []))
    with preparing(pipeline):
        documents = pipeline.data.documents[start - 1 : start - 1 + rows]
        classes, task = pipeline.data.classes, pipeline.recipe.task
    shown = [
        {
            "where": document.where,
            "ids": document.ids.tolist(),
            "tokens": [pipeline.tokenizer.decode([token]) for token in document.ids.tolist()],
            "trained": (document.weights > 0).tolist(),
        }
        | ({} if document.labels is None else {"labels": label_names(document, task, classes)})
        | ({"second": document.second} if document.second else {})
        for document in documents
    ]
    if json_output:
        print_json(shown)
        return
    for row in shown:
        trained = sum(row["trained"])
        out.print(
            f"[bold]{escape(row['where'])}[/bold]  {len(row['ids'])} tokens, {trained} trained"
        )
        for side, part in _sides(row).items():
            if side:
                out.print(f"[bold]{side}[/bold]")
            ids, marks = row["ids"][part], row["trained"][part]
            out.print(_coloured(pipeline.tokenizer, ids, marks), soft_wrap=True)
        if "labels" in row and "second" not in row:
            out.print(Text(f"labels: {', '.join(row['labels'])}"))
        out.print()
    out.print("[green underline]trained[/green underline]  [dim]context[/dim]")


def _sides(row: dict[str, Any]) -> dict[str, slice]:
    """The texts of a row by name: of a pair two."""
    if "second" not in row:
        return {"": slice(None)}
    return {"chosen": slice(row["second"]), "rejected": slice(row["second"], None)}


def _coloured(tokenizer: Any, ids: list[int], trained: list[bool]) -> Text:
    """Runs of trained and untrained tokens are decoded together, so that characters of several
    tokens stay whole."""
    text = Text()
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            style = "green underline" if trained[start] else "dim"
            text.append(tokenizer.decode(ids[start:end]), style=style)
            start = end
    return text


@app.command()
def audit(
    recipe: RecipePath,
    overrides: Overrides = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the rows, to look at and search.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """What will be learnt, and mistakes in it. Exits with 2 when a finding blocks training."""
    from llamaweft.pipeline import Pipeline

    pipeline = Pipeline(Recipe.load(recipe, overrides or []))
    with preparing(pipeline):
        found = pipeline.data.audit
    if json_output:
        print_json(found.to_dict())
    else:
        print_audit(found.to_dict())
    if html is not None:
        pipeline.write_audit_page(html)
        say(f"wrote {html}")
    if found.blocking:
        raise typer.Exit(2)


def print_audit(content: dict[str, Any]) -> None:
    rows, tokens, trained = content["rows"], content["tokens"], content["trained_tokens"]
    share = trained / tokens if tokens else 0
    out.print(
        facts(
            "The data",
            {
                "rows": f"{rows:,} to learn from, {content['validation_rows']:,} held out",
                "tokens": f"{tokens:,}, {trained:,} of them trained ({share:.0%})",
                "in a row": _quantiles(content["lengths_tokens"]),
                "trained in a row": _quantiles(content["trained_tokens_per_row"]),
            },
        )
    )
    if content["cleaning"]:
        cleaned = table("Cleaning", "step", "removed", "changed", "where")
        for step in content["cleaning"]:
            where = escape("; ".join(step["examples"][:2]))
            cleaned.add_row(step["step"], f"{step['count']:,}", f"{step['changed']:,}", where)
        out.print(cleaned)
    styles = {"passed": "green", "warning": "yellow", "allowed": "yellow", "blocking": "bold red"}
    findings = table("The audit", "check", "", "rows", "where and what to do")
    for finding in content["findings"]:
        style = styles[finding["status"]]
        where = ", ".join(finding["examples"][:2])
        note = f"{where}: {finding['remedy']}" if finding["count"] else ""
        findings.add_row(
            finding["check"],
            f"[{style}]{finding['status']}[/{style}]",
            str(finding["count"] or ""),
            escape(note),
        )
    out.print(findings)


def _quantiles(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items()) + " tokens"
