"""The loop: sum, count, divide once; what is kept, when it stops, how it goes on."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llamaweft.data.chat import Document
from llamaweft.errors import RunError
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.train import step as step_module
from llamaweft.train.checkpoint import LoopState, complete_checkpoints, load_checkpoint
from llamaweft.train.events import Announcer, Ended, StepEnded, StopRequest, Validated
from llamaweft.train.loop import Loop
from llamaweft.train.optim import build_optimizer, build_scaler, trained_parameters
from llamaweft.train.schedule import LearningRate
from llamaweft.train.step import Settings


def documents() -> list[Document]:
    """Four documents with 39, 1, 12 and 5 labels."""
    random = np.random.default_rng(0)
    made = []
    for length, labels in [(40, 39), (20, 1), (25, 12), (9, 5)]:
        weights = np.zeros(length, np.float32)
        weights[length - labels :] = 1
        made.append(Document(random.integers(0, 900, length).astype(np.int32), weights, ""))
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
        scaler=changes.pop("scaler", build_scaler(torch.device("cpu"), torch.float32)),
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


def test_a_gain_too_small_to_count_is_kept_but_does_not_renew_patience(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """From 1.0, the gains to 0.95 and to 0.9 are below 0.2 alone and together; 0.7 counts."""
    steps = [[Pack.from_documents(documents()[:1])] for _ in range(9)]
    for values, ended in (([1.0, 0.95, 0.9, 0.5], 3), ([1.0, 0.95, 0.7, 0.69, 0.68], 5)):
        loop, seen = loop_over(
            steps,
            tiny_folder,
            tmp_path,
            evaluator=scripted(values),
            evaluate_every_steps=1,
            early_stopping_patience=2,
            early_stopping_min_gain=0.2,
        )
        assert loop.run() == "early_stopping"
        assert loop.state.step == loop.state.best_step == ended
        assert all(e.best for e in seen if isinstance(e, Validated))


def test_what_is_no_number_is_never_the_best(tiny_folder: Path, tmp_path: Path) -> None:
    steps = [[Pack.from_documents(documents()[:1])] for _ in range(3)]
    loop, _ = loop_over(
        steps,
        tiny_folder,
        tmp_path,
        evaluator=scripted([float("nan"), 2.0, float("nan")]),
        evaluate_every_steps=1,
    )
    loop.run()
    assert (loop.state.best_step, loop.state.best_value) == (2, 2.0)


def test_turns_of_others_are_no_time_of_a_step(
    tiny_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """Each look at the clock is a second later; others take a thousand."""
    seconds = itertools.count()
    monkeypatch.setattr(step_module.time, "perf_counter", lambda: float(next(seconds)))
    packs = [Pack.from_documents(documents()[:1])] * 2
    loop, seen = loop_over([packs], tiny_folder, tmp_path)
    turns = loop.turns()
    for _ in packs:
        next(turns)
        seconds = itertools.count(next(seconds) + 1000)
    with pytest.raises(StopIteration):
        next(turns)
    (step,) = (e for e in seen if isinstance(e, StepEnded))
    assert loop.away_seconds > 2000
    assert 0 < step.seconds < 100


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


def test_max_seconds_leaves_time_to_validate_and_save(tiny_folder: Path, tmp_path: Path) -> None:
    steps = [[Pack.from_documents(documents()[:1])] for _ in range(9)]
    loop, _ = loop_over(steps, tiny_folder, tmp_path, max_seconds=1000.0, evaluator=scripted([1.0]))
    loop.longest["validation"] = 600.0  # as measured on the untouched model
    loop.announce.listeners.append(
        lambda event: (
            loop.longest.update(step=500.0)
            if isinstance(event, StepEnded) and event.step == 3
            else None
        )
    )
    assert loop.run() == "max_seconds"
    assert (loop.state.step, loop.state.best_step) == (3, 3)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_without_validation_the_last_weights_are_kept(tiny_folder: Path, tmp_path: Path) -> None:
    kept: list[int] = []
    steps = [[Pack.from_documents(documents()[:1])] for _ in range(2)]
    loop, _ = loop_over(
        steps, tiny_folder, tmp_path, keep_best=lambda: kept.append(loop.state.step)
    )
    assert loop.run() == "finished"
    assert kept == [2]


def steps_ended(seen: list) -> list[StepEnded]:
    return [event for event in seen if isinstance(event, StepEnded)]


def test_without_a_scaler_a_step_is_torchs_own(tiny_folder: Path, tmp_path: Path) -> None:
    """A disabled scaler changes no bit of what backward, clip and step would do alone."""
    packs = [Pack.from_documents([d]) for d in documents()]
    loop, seen = loop_over([packs], tiny_folder, tmp_path, max_grad_norm=0.5)
    loop.run()
    alone = load_causal_lm(tiny_folder, base_weights=None)
    count = torch.stack([pack.label_weight_N.sum() for pack in packs]).sum()
    for pack in packs:
        (alone.loss(pack)[0] / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
    torch.optim.SGD(alone.parameters(), lr=0.5).step()
    assert steps_ended(seen)[0].grad_norm == norm.item()
    assert all(torch.equal(p, alone.get_parameter(n)) for n, p in loop.parameters.items())
    assert (loop.state.loss_scale, loop.state.steps_at_loss_scale) == (None, 0)


def fp16_scaler(**changes) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **changes)


def fp16_loop(
    gradients: list[float], folder: Path, tmp_path: Path, **changes
) -> tuple[Loop, list, torch.nn.Parameter]:
    """A loop over one weight, from zero, whose gradient in each step is given and passes through
    fp16; its loss is always 3."""
    weight = torch.nn.Parameter(torch.zeros(()))
    left = iter(gradients)

    def objective(pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        count = pack.label_weight_N.sum()
        through = weight.to(torch.float16).float() * next(left)
        return (through - through.detach() + 3) * count, count

    steps = [[Pack.from_documents(documents()[:1])] for _ in gradients]
    loop, seen = loop_over(steps, folder, tmp_path, **{"scaler": fp16_scaler()} | changes)
    loop.parameters, loop.objective = {"weight": weight}, objective
    loop.optimizer = torch.optim.SGD([weight], lr=1.0)
    return loop, seen, weight


def test_a_gradient_too_small_for_fp16_arrives(tiny_folder: Path, tmp_path: Path) -> None:
    """fp16's smallest number is 6e-8; rounded to its 11 bits, a scaled 1e-8 is right to 0.05%."""
    loop, seen, weight = fp16_loop([1e-8], tiny_folder, tmp_path)
    loop.run()
    assert weight.item() == pytest.approx(-0.5 * 1e-8, rel=5e-4)
    assert steps_ended(seen)[0].loss == 3
    assert steps_ended(seen)[0].grad_norm == pytest.approx(1e-8, rel=5e-4)


def test_the_gradient_is_clipped_after_it_is_unscaled(tiny_folder: Path, tmp_path: Path) -> None:
    loop, _, weight = fp16_loop([0.25], tiny_folder, tmp_path, max_grad_norm=0.5)
    loop.run()
    assert weight.item() == -0.5 * 0.25


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_an_overflow_skips_the_weights_and_counts_as_a_step(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """1.5 times the first scale, 65536, is more than fp16 holds; half of it is not."""
    loop, seen, weight = fp16_loop([1.5, 1.5, 1.5], tiny_folder, tmp_path)
    loop.optimizer = build_optimizer(
        name, loop.parameters, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8
    )
    after: list[float] = []
    loop.announce.listeners.append(
        lambda event: after.append(weight.item()) if isinstance(event, StepEnded) else None
    )
    loop.run()
    assert [event.step for event in steps_ended(seen)] == [1, 2, 3]
    assert [event.grad_norm for event in steps_ended(seen)] == [np.inf, 1.5, 1.5]
    assert [event.loss for event in steps_ended(seen)] == [3, 3, 3]
    assert after == pytest.approx([0, -0.5, -1.0])
    assert (loop.state.loss_scale, loop.state.steps_at_loss_scale) == (2.0**15, 2)
    assert loop.optimizer.state[weight]["step"] == 2


def test_what_overflows_without_a_scale_ends_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    loop, seen, weight = fp16_loop(
        [1e6] * 5, tiny_folder, tmp_path, scaler=fp16_scaler(init_scale=4.0)
    )
    with pytest.raises(RunError, match="fp16 cannot hold the numbers of step 3"):
        loop.run()
    assert len(steps_ended(seen)) == 2
    assert weight.item() == 0


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_resumed_fp16_run_is_the_uninterrupted_one(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """The scale doubles after every second step, so that a forgotten scale rounds the gradients
    differently, and a forgotten count of steps doubles it too late."""
    steps = [[Pack.from_documents([d]) for d in documents()[i % 4 :]] for i in range(6)]

    def part(folder: str, stop_after: int | None = None) -> tuple[Loop, list[float]]:
        scaler, stop = fp16_scaler(init_scale=2.0, growth_interval=2), StopRequest()
        loop, seen = loop_over(steps, tiny_folder, tmp_path / folder, scaler=scaler, stop=stop)
        loop.model.model.compute_dtype = torch.float16
        loop.learning_rate = LearningRate(1e-3, "constant", 6, 0)
        loop.optimizer = build_optimizer(
            name, loop.parameters, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8
        )
        for checkpoint in complete_checkpoints(loop.settings.checkpoints):
            loop.resume(checkpoint)
        loop.announce.listeners.append(
            lambda event: (
                stop("SIGTERM")
                if isinstance(event, StepEnded) and event.step == stop_after
                else None
            )
        )
        loop.run()
        return loop, [event.grad_norm for event in steps_ended(seen)]

    whole, norms = part("whole")
    _, first = part("stopped", stop_after=3)
    resumed, rest = part("stopped")
    assert first + rest == norms
    assert resumed.state == whole.state
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()
    assert whole.state.loss_scale == 2.0**4
    ends = [load_checkpoint(tmp_path / n / "checkpoints/step-000006") for n in ("whole", "stopped")]
    for kind in ("trained", "optimizer"):
        ours, theirs = (getattr(end, kind) for end in ends)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), kind
