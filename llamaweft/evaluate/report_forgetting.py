"""What evaluation.json says of forgetting, as text: for the reports and the terminal."""

from __future__ import annotations

from typing import Any

from llamaweft.evaluate.forgetting import KL
from llamaweft.evaluate.report_metrics import compare_metrics

COLUMNS = ("Area", "KL, nats per token", "Loss before", "Loss after", "After - before", "Verdict")


def forgetting_view(content: dict[str, Any] | None) -> dict[str, Any] | None:
    """{"summary", "budget": a sentence or None, "kept": whether the budget is, "rows": for all
    prompts and for each area one text a column of COLUMNS}; None where nothing was measured."""
    if content is None:
        return None
    rows = [_row("all", content)]
    rows += [_row(area, tested) for area, tested in content["areas"].items()]
    return {
        "summary": f"{content['prompts']:,} general prompts, {content['tokens']:,} tokens of "
        "reference answers",
        "rows": rows,
        **_budget(content),
    }


def _row(name: str, tested: dict[str, Any]) -> tuple[str, ...]:
    loss = tested["loss"]
    (both,) = compare_metrics(
        {
            "before": {"metrics": {"loss": loss["before"]}},
            "after": {"metrics": {"loss": loss["after"]}},
            "difference": {"loss": loss["difference"]},
        }
    )
    (kl,) = compare_metrics({"after": {"metrics": {KL: tested["kl"]}}})
    return name, kl["after"], *(both[key] for key in ("before", "after", "difference", "verdict"))


def _budget(content: dict[str, Any]) -> dict[str, Any]:
    most = content.get("max_kl")
    if most is None:
        return {"budget": None, "kept": True}
    sentence = f"Budget: a KL of {most:g} nats per token"
    step, stopped = content.get("step"), content.get("stopped_at_step")
    if step == 0:
        sentence += ". No evaluation kept within it, so the weights are those of the run's start"
    else:
        sentence += f", kept by the weights of step {step}"
    if stopped is not None:
        sentence += f". The run was ended at step {stopped}, which was over it"
    return {"budget": f"{sentence}.", "kept": step != 0}
