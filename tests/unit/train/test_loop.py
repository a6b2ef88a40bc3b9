"""The loop: sum, count, divide once; what is kept, when it stops, how it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llamaweft.data.chat import Document
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.train.checkpoint import LoopState
from llamaweft.train.events import Announcer, Ended, StepEnded, StopRequest, Validated
from llamaweft.train.loop import Loop, Settings
from llamaweft.train.optim import trained_parameters
from llamaweft.train.schedule import LearningRate


def documents() -> list[Document]:
    """Four documents with 39, 1, 12 and 5 labels."""
    random = np.random.default_rng(0)
    made = []
    for length, labels in [(40, 39), (20, 1), (25, 12), (9, 5)]:
        weights = np.zeros(length, np.float32)
        weights[length - labels :] = 1
        made.append(Document(random.integers(0, 900, length).astype(np.int32), weights, "", ""))
    return made


class Steps:
    """A loader of given steps."""

    def __init__(self, steps: list[list[Pack]]) -> None:
        self.given, self.total_steps = steps, len(steps)

    def steps(self, start_step: int = 0):
        yield from self.given[start_step:]


def loop_over(
    steps: list[list[Pack]], folder: Path, tmp_path: Path, **changes
) -> tuple[Loop, list]:
    """A loop with plain gradient descent, so that weights show the gradient itself."""
    model = load_causal_lm(folder, base_weights=None)
    parameters = trained_parameters(model)
    seen: list = []
    settings = Settings(
        checkpoints=tmp_path / "checkpoints",
        checkpoint_every_steps=1000,
        save_total_limit=2,
        evaluate_every_steps=None,
        early_stopping_patience=None,
        max_grad_norm=None,
        best_metric="loss",
    )
    fields = {name: changes.pop(name) for name in list(changes) if hasattr(settings, name)}
    loop = Loop(
        model=model,
        parameters=parameters,
        objective=model.loss,
        loader=Steps(steps),
        optimizer=torch.optim.SGD(parameters.values(), lr=1.0),
        learning_rate=LearningRate(0.5, "constant", len(steps), 0),
        evaluator=changes.pop("evaluator", None),
        keep_best=changes.pop("keep_best", lambda: None),
        useful_flops=lambda packs: 1.0,
        settings=replace(settings, **fields),
        announce=Announcer([seen.append]),
        stop=changes.pop("stop", StopRequest()),
        device=torch.device("cpu"),
        state=LoopState(),
    )
    assert not changes
    return loop, seen


def test_accumulating_four_of_one_equals_one_of_four(tiny_folder: Path, tmp_path: Path) -> None:
    apart = [[Pack.from_documents([d]) for d in documents()]]
    together = [[Pack.from_documents(documents())]]
    (one, one_seen), (four, four_seen) = (
        loop_over(steps, tiny_folder, tmp_path, checkpoint_every_steps=10)
        for steps in (together, apart)
    )
    start = {n: p.detach().clone() for n, p in one.parameters.items()}
    one.run()
    four.run()
    for name, parameter in one.parameters.items():
        change = parameter.detach() - start[name]
        other = four.parameters[name].detach() - start[name]
        assert (change - other).norm() <= 1e-6 * start[name].norm(), name
        assert change.norm() > 0
    a, b = (next(e for e in seen if isinstance(e, StepEnded)) for seen in (one_seen, four_seen))
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    assert (a.tokens, a.trained_tokens) == (b.tokens, b.trained_tokens) == (94, 57)


def test_clipping_limits_the_norm(tiny_folder: Path, tmp_path: Path) -> None:
    steps = [[Pack.from_documents(documents())]]
    loop, seen = loop_over(steps, tiny_folder, tmp_path, max_grad_norm=0.01)
    start = {n: p.detach().clone() for n, p in loop.parameters.items()}
    loop.run()
    moved = torch.stack([(p.detach() - start[n]).norm() for n, p in loop.parameters.items()])
    assert float(moved.norm()) == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert next(e for e in seen if isinstance(e, StepEnded)).grad_norm > 0.01


def scripted(values: list[float]):
    """An evaluator that measures these losses, one after another."""
    left = iter(values)
    return lambda: {"loss": {"value": next(left)}}


def test_the_best_is_kept_and_patience_ends_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    steps = [[Pack.from_documents(documents()[:1])] for _ in range(9)]
    kept: list[int] = []
    loop, seen = loop_over(
        steps,
        tiny_folder,
        tmp_path,
        evaluator=scripted([3.0, 1.0, 2.0, 1.5, 0.5]),
        evaluate_every_steps=1,
        early_stopping_patience=2,
        keep_best=lambda: kept.append(loop.state.step),
    )
    assert loop.run() == "early_stopping"
    assert kept == [1, 2]
    assert (loop.state.step, loop.state.best_step, loop.state.best_value) == (4, 2, 1.0)
    assert [e.best for e in seen if isinstance(e, Validated)] == [True, True, False, False]
    assert seen[-1] == Ended(4, "early_stopping")


def test_a_stop_request_saves_and_does_not_validate(tiny_folder: Path, tmp_path: Path) -> None:
    stop = StopRequest()
    steps = [[Pack.from_documents(documents()[:1])] for _ in range(9)]
    loop, _ = loop_over(
        steps, tiny_folder, tmp_path, stop=stop, evaluator=scripted([1.0]), evaluate_every_steps=5
    )
    loop.announce.listeners.append(
        lambda event: stop("SIGTERM") if isinstance(event, StepEnded) and event.step == 2 else None
    )
    assert loop.run() == "SIGTERM"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert loop.state.best_step is None


def test_without_validation_the_last_weights_are_kept(tiny_folder: Path, tmp_path: Path) -> None:
    kept: list[int] = []
    steps = [[Pack.from_documents(documents()[:1])] for _ in range(2)]
    loop, _ = loop_over(
        steps, tiny_folder, tmp_path, keep_best=lambda: kept.append(loop.state.step)
    )
    assert loop.run() == "finished"
    assert kept == [2]
