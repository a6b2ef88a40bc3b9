"""A step that would do harm is left out; one that is too large for the memory is computed in parts;
one that is stopped in its midst goes on there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llamaweft.data.chat import Document
from llamaweft.errors import RunError
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.train.checkpoint import (
    LoopState,
    complete_checkpoints,
    load_checkpoint,
    read_state,
)
from llamaweft.train.events import (
    Announcer,
    CheckpointSaved,
    InterruptedByRequest,
    PacksSplit,
    StepEnded,
    StepLeftOut,
    StopRequest,
    WentBack,
)
from llamaweft.train.guard import GuardSettings
from llamaweft.train.in_backward import InBackward
from llamaweft.train.loop import Loop
from llamaweft.train.metrics import MetricsFile, read_metrics
from llamaweft.train.optim import build_optimizer, build_scaler, trained_parameters
from llamaweft.train.quarantine import QuarantineFile
from llamaweft.train.schedule import LearningRate
from llamaweft.train.step import Settings

BAD = 7
"""A token that the losses of this file are spoilt at."""


def document(seed: int, length: int = 24, bad: bool = False) -> Document:
    random = np.random.default_rng(seed)
    ids = random.integers(10, 900, length).astype(np.int32)
    if bad:
        ids[0] = BAD
    weights = np.ones(length, np.float32)
    return Document(ids, weights, f"rows.jsonl line {seed + 1}")


class Dealt:
    """A loader of given documents: for each step, those of each pack."""

    def __init__(self, steps: list[list[list[Document]]]) -> None:
        self.given, self.total_steps = steps, len(steps)
        self.collate = Pack.from_documents

    def steps(self, start_step: int = 0):
        for packs in self.given[start_step:]:
            yield [self.collate(documents) for documents in packs]

    def documents_of(self, step: int) -> list[list[Document]]:
        return self.given[step]


def a_loop(
    given: list[list[list[Document]]],
    folder: Path,
    tmp_path: Path,
    **settings,
) -> tuple[Loop, list]:
    """A loop whose loss is spoilt by documents that begin with BAD: times `spoilt`."""
    torch.manual_seed(0)
    model = load_causal_lm(folder, base_weights=None)
    parameters = trained_parameters(model)
    seen: list = []
    loop = Loop(
        model=model,
        parameters=parameters,
        objective=model.loss,
        loader=Dealt(given),
        optimizer=build_optimizer(
            "adamw", parameters, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8
        ),
        scaler=build_scaler(torch.device("cpu"), torch.float32),
        learning_rate=LearningRate(1e-3, "constant", len(given), 0),
        evaluator=settings.pop("evaluator", None),
        keep_best=lambda: None,
        useful_flops=lambda packs: 1.0,
        settings=Settings(
            checkpoints=tmp_path / "checkpoints",
            checkpoint_every_steps=settings.pop("checkpoint_every_steps", 1000),
            save_total_limit=9,
            evaluate_every_steps=settings.pop("evaluate_every_steps", None),
            early_stopping_patience=None,
            max_grad_norm=1.0,
            best_metric="loss",
            guard=settings.pop("guard", GuardSettings()),
            memory_budget=settings.pop("memory_budget", None),
        ),
        announce=Announcer([seen.append]),
        stop=StopRequest(),
        device=torch.device("cpu"),
        state=LoopState(),
    )
    assert not settings
    return loop, seen


def spoil(loop: Loop, factor: float, *, gradient_only: bool = False) -> None:
    """Multiply the loss, or only its gradient, of packs in which a document begins with BAD."""
    sound = loop.objective

    def spoilt(pack: Pack):
        total, count = sound(pack)
        if bool(((pack.ids_T == BAD) & (pack.positions_T == 0)).any()):
            if not gradient_only:
                return total * factor, count
            total.register_hook(lambda gradient: gradient * factor)
        return total, count

    loop.objective = spoilt


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loop.parameters.items()}


def of(kind: type, seen: list) -> list:
    return [event for event in seen if isinstance(event, kind)]


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_is_left_out_and_its_row_named(
    factor: float, gradient_only: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    """The weights and moments are those of a run without that step, at the same rates."""
    given = [[[document(0)], [document(1)]], [[document(2), document(3, bad=True)], [document(4)]]]
    loop, seen = a_loop(given, tiny_folder, tmp_path)
    spoil(loop, factor, gradient_only=gradient_only)
    assert loop.run() == "finished"
    without, _ = a_loop(given[:1], tiny_folder, tmp_path / "without")
    without.run()
    for name, tensor in weights(without).items():
        assert torch.equal(tensor, loop.parameters[name]), name
    (event,) = of(StepLeftOut, seen)
    assert [d.where for d in event.documents] == ["rows.jsonl line 4"]
    assert event.step == 2
    assert ("gradient" in event.reason) == gradient_only
    assert [e.skipped for e in of(StepEnded, seen)] == [False, True]
    moments = loop.optimizer.state[next(iter(loop.parameters.values()))]
    assert int(moments["step"]) == 1


def test_all_rows_of_the_step_are_named_where_none_does_harm_alone(
    tiny_folder: Path, tmp_path: Path
) -> None:
    given = [[[document(0), document(1)], [document(2)]]]
    loop, seen = a_loop(given, tiny_folder, tmp_path)
    sound = loop.objective

    def together(pack: Pack):
        total, count = sound(pack)
        return (total * float("nan") if len(pack.parent_S) == 2 else total), count

    loop.objective = together
    loop.run()
    (event,) = of(StepLeftOut, seen)
    assert [d.where for d in event.documents] == [f"rows.jsonl line {i}" for i in (1, 2, 3)]


def test_looking_for_the_row_draws_no_random_number_of_the_run(
    tiny_folder: Path, tmp_path: Path
) -> None:
    given = [[[document(0, bad=True), document(1)]], [[document(2)]]]
    drawn = []
    for spoilt in (False, True):
        loop, _ = a_loop(given, tiny_folder, tmp_path / str(spoilt))
        sound = loop.objective

        def noisy(pack: Pack, sound=sound):
            torch.rand(3)
            return sound(pack)

        loop.objective = noisy
        if spoilt:
            spoil(loop, float("nan"))
        loop.run()
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


def test_a_spike_is_left_out_where_the_recipe_asks_for_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    given = [[[document(i)]] for i in range(25)]
    given[23] = [[document(23, bad=True)]]
    left_out = []
    for spike in (None, 8.0):
        loop, seen = a_loop(given, tiny_folder, tmp_path, guard=GuardSettings(loss_spike=spike))
        spoil(loop, 40.0)
        loop.run()
        left_out.append([event.step for event in of(StepLeftOut, seen)])
    assert left_out == [[], [24]]


def test_after_some_in_a_row_the_loop_goes_back_at_a_lower_rate(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Steps 3 and 4 do harm the first time; after going back to step 2 nothing does."""
    given = [[[document(i, bad=i in (2, 3))]] for i in range(6)]
    settings = GuardSettings(2, goes_back=True, learning_rate_factor=0.25)
    loop, seen = a_loop(given, tiny_folder, tmp_path, guard=settings, checkpoint_every_steps=2)
    sound = loop.objective
    spoil(loop, float("nan"))
    loop.announce.listeners += [
        lambda event: isinstance(event, WentBack) and setattr(loop, "objective", sound),
        MetricsFile(tmp_path / "metrics.jsonl", 0),
    ]
    assert loop.run() == "finished"
    assert of(WentBack, seen) == [WentBack(step=4, to_step=2, learning_rate_factor=0.25)]
    taken = [(e.step, e.lr, e.skipped) for e in of(StepEnded, seen)]
    first = [(1, 1e-3, False), (2, 1e-3, False), (3, 1e-3, True), (4, 1e-3, True)]
    assert taken == [*first, *[(step, 2.5e-4, False) for step in (3, 4, 5, 6)]]
    lines = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert lines == [1, 2, 3, 4, 5, 6]

    # The same from a plain loop that has the lower rate from the third step on.
    plain, _ = a_loop(given, tiny_folder, tmp_path / "plain")
    plain.learning_rate = lambda step: 1e-3 if step <= 2 else 2.5e-4
    plain.run()
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, loop.parameters[name]), name


def test_no_checkpoint_is_made_of_a_state_after_steps_left_out(
    tiny_folder: Path, tmp_path: Path
) -> None:
    given = [[[document(i, bad=i == 1)]] for i in range(3)]
    loop, _ = a_loop(given, tiny_folder, tmp_path, checkpoint_every_steps=1)
    spoil(loop, float("nan"))
    loop.run()
    names = [folder.name for folder in complete_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000001", "step-000003"]


@pytest.mark.parametrize("goes_back", [False, True])
def test_the_loop_ends_where_it_may_not_go_back_again(
    goes_back: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    given = [[[document(i, bad=i > 0)]] for i in range(4)]
    settings = GuardSettings(2, goes_back=goes_back, max_returns=2)
    loop, seen = a_loop(given, tiny_folder, tmp_path, guard=settings, checkpoint_every_steps=1)
    spoil(loop, float("nan"))
    with pytest.raises(RunError, match=r"left out 2 steps in a row.*the last one is step 3"):
        loop.run()
    assert len(of(WentBack, seen)) == (2 if goes_back else 0)


def test_the_first_good_state_is_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    given = [[[document(0, bad=True)]], [[document(1)]]]
    settings = GuardSettings(1, goes_back=True)
    loop, seen = a_loop(given, tiny_folder, tmp_path, guard=settings)
    sound = loop.objective
    spoil(loop, float("nan"))
    loop.announce.listeners.append(
        lambda event: isinstance(event, WentBack) and setattr(loop, "objective", sound)
    )
    assert loop.run() == "finished"
    assert [event.to_step for event in of(WentBack, seen)] == [0]


def test_a_gradient_that_is_no_number_stops_updates_in_the_backward_pass(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Some weights are changed by then, so the loop goes back at once."""
    given = [[[document(0)]], [[document(1, bad=True)]], [[document(2)]]]
    settings = GuardSettings(3, goes_back=True)
    loop, seen = a_loop(given, tiny_folder, tmp_path, guard=settings, checkpoint_every_steps=1)
    loop.settings = replace(loop.settings, max_grad_norm=None)
    loop.in_backward = InBackward(loop.optimizer, loop.parameters, lambda: False)
    sound = loop.objective
    spoil(loop, float("inf"), gradient_only=True)
    loop.announce.listeners.append(
        lambda event: isinstance(event, WentBack) and setattr(loop, "objective", sound)
    )
    assert loop.run() == "finished"
    assert [(event.step, event.to_step) for event in of(WentBack, seen)] == [(2, 1)]
    assert all(bool(p.isfinite().all()) for p in loop.parameters.values())


def test_quarantine_keeps_rows_and_forgets_what_a_resumed_run_comes_to_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "quarantine.jsonl"

    def describe(document: Document) -> dict:
        return {"where": document.where}

    file = QuarantineFile(path, describe)
    assert not path.exists()
    file(StepLeftOut(2, "the loss is nan", [document(4)]))
    file(WentBack(4, 2, 0.5))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["rows"] == [{"where": "rows.jsonl line 5"}]
    assert lines[1] == {"step": 4, "went_back_to_step": 2, "learning_rate_factor": 0.5}
    QuarantineFile(path, describe, records=1)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2]


class Failing:
    """An objective that fails as an allocator does for packs of more than `most` tokens."""

    def __init__(self, objective, most: int, error: Exception) -> None:
        self.objective, self.most, self.error = objective, most, error
        self.sizes: list[int] = []

    def __call__(self, pack: Pack):
        self.sizes.append(pack.tokens)
        total, count = self.objective(pack)
        if pack.tokens > self.most:
            raise self.error
        return total, count


ALLOCATORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ALLOCATORS, ids=lambda error: type(error).__name__)
def test_where_memory_runs_out_the_pack_is_split_and_the_result_is_the_same(
    error: Exception, tiny_folder: Path, tmp_path: Path
) -> None:
    """The second pack is too large, after the first has added to the gradient. Other orders of
    summation: 1e-5 of the change by norm, per tensor."""
    first, second = [document(i) for i in range(2)], [document(i) for i in range(2, 10)]
    given = [[first, second]] * 3
    start, whole = {}, {}
    for limited in (False, True):
        loop, seen = a_loop(given, tiny_folder, tmp_path / str(limited))
        # Plain descent: AdamW would blow up the rounding of gradients near zero.
        loop.optimizer = torch.optim.SGD(loop.parameters.values(), lr=1.0)
        loop.learning_rate = LearningRate(0.5, "constant", 3, 0)
        start = weights(loop)
        if limited:
            loop.objective = failing = Failing(loop.objective, 100, error)
        loop.run()
        if not limited:
            whole = weights(loop)
            losses = [event.loss for event in of(StepEnded, seen)]
    for name, tensor in whole.items():
        change = (tensor - start[name]).norm()
        allowed = 1e-5 * change + 1e-7 * tensor.norm()  # and the rounding of the weights themselves
        assert (loop.parameters[name] - tensor).norm() <= allowed, name
    assert [e.loss for e in of(StepEnded, seen)] == pytest.approx(losses, rel=1e-6)
    assert [event.over_tokens for event in of(PacksSplit, seen)] == [96]
    # 48 + 192 fails; from then on never more than 96 at once.
    assert failing.sizes == [48, 192, *[48, 96, 96] * 3]


def test_a_document_that_is_too_large_alone_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    loop, _ = a_loop([[[document(0), document(1, 40)]]], tiny_folder, tmp_path)
    loop.objective = Failing(loop.objective, 10, MemoryError())
    with pytest.raises(RunError, match=r"rows.jsonl line 2 with 40 tokens"):
        loop.run()


def test_other_errors_are_not_taken_for_memory(tiny_folder: Path, tmp_path: Path) -> None:
    loop, _ = a_loop([[[document(0), document(1)]]], tiny_folder, tmp_path)
    loop.objective = Failing(loop.objective, 10, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        loop.run()


def test_far_over_the_budget_packs_are_split_until_single_documents_are_borne(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """This process holds far more than a budget of one byte, whatever is split."""
    given = [[[document(i) for i in range(4)]]] * 2
    loop, seen = a_loop(given, tiny_folder, tmp_path, memory_budget=1)
    sizes = []
    sound = loop.objective

    def counted(pack: Pack):
        sizes.append(pack.tokens)
        return sound(pack)

    loop.objective = counted
    assert loop.run() == "finished"
    assert [event.over_tokens for event in of(PacksSplit, seen)] == [48, 24]
    assert sizes == [96, 48, 24, *[24] * 8]  # the third is borne from its second try on


def test_within_the_budget_nothing_is_split(tiny_folder: Path, tmp_path: Path) -> None:
    loop, seen = a_loop([[[document(0), document(1)]]], tiny_folder, tmp_path, memory_budget=2**50)
    loop.run()
    assert of(PacksSplit, seen) == []


def noisy(loop: Loop) -> None:
    """Let the loss depend on random numbers, as dropout does."""
    sound = loop.objective

    def objective(pack: Pack):
        total, count = sound(pack)
        return total * (1 + 0.1 * torch.rand(())), count

    loop.objective = objective


@pytest.mark.parametrize("packs_done", [1, 2, 3])
def test_a_step_that_was_stopped_in_its_midst_goes_on_bit_for_bit(
    packs_done: int, tiny_folder: Path, tmp_path: Path
) -> None:
    given = [[[document(4 * step + i)] for i in range(4)] for step in range(3)]
    whole, whole_seen = a_loop(given, tiny_folder, tmp_path / "whole")
    noisy(whole)
    torch.manual_seed(1)
    whole.run()

    stopped, seen = a_loop(given, tiny_folder, tmp_path / "stopped")
    noisy(stopped)
    calls, inner = [], stopped.objective

    def counted(pack: Pack):
        calls.append(1)
        if len(calls) == 4 + packs_done:
            stopped.stop("SIGTERM")
        return inner(pack)

    stopped.objective = counted
    torch.manual_seed(1)
    assert stopped.run() == "SIGTERM"
    (checkpoint,) = complete_checkpoints(tmp_path / "stopped/checkpoints")
    assert checkpoint.name == f"step-000001-pack-{packs_done:03d}"
    assert (checkpoint / "gradients.safetensors").exists()

    resumed, rest = a_loop(given, tiny_folder, tmp_path / "stopped")
    noisy(resumed)
    torch.manual_seed(99)
    resumed.resume(checkpoint)
    assert resumed.run() == "finished"
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, resumed.parameters[name]), name
    ends = [
        [(e.step, e.loss, e.grad_norm) for e in of(StepEnded, s)] for s in (seen + rest, whole_seen)
    ]
    assert ends[0] == ends[1]
    last = load_checkpoint(complete_checkpoints(tmp_path / "stopped/checkpoints")[-1])
    assert last.gradients == {}


def test_a_validation_that_was_cut_short_is_done_first_by_the_resumed_run(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """What it had drawn of random numbers is given back."""
    given = [[[document(i)]] for i in range(4)]

    def evaluated(stop_at: int | None, folder: str, checkpoint: Path | None = None):
        measured: list[int] = []

        def evaluator():
            torch.rand(5)
            if loop.state.step == stop_at:
                loop.stop("SIGTERM")
            try:
                loop.stop.check()
            except InterruptedByRequest:
                torch.rand(1)
                raise
            measured.append(loop.state.step)
            return {"loss": {"value": 1.0}}

        loop, _ = a_loop(
            given, tiny_folder, tmp_path / folder, evaluator=evaluator, evaluate_every_steps=2
        )
        noisy(loop)
        torch.manual_seed(3)
        if checkpoint is not None:
            loop.resume(checkpoint)
        return loop.run(), measured, loop

    assert evaluated(None, "whole")[1] == [2, 4]
    reason, measured, _ = evaluated(2, "cut")
    (checkpoint,) = complete_checkpoints(tmp_path / "cut/checkpoints")
    assert (reason, measured, read_state(checkpoint).validation_due) == ("SIGTERM", [], True)
    reason, measured, resumed = evaluated(None, "cut", checkpoint)
    assert (reason, measured) == ("finished", [2, 4])
    whole = evaluated(None, "again")[2]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, resumed.parameters[name]), name


def test_the_start_is_saved_where_the_guard_may_go_back_to_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    given = [[[document(0)]]]
    loop, seen = a_loop(given, tiny_folder, tmp_path, guard=GuardSettings(goes_back=True))
    begun: list[bool] = []
    start = tmp_path / "checkpoints/start"
    loop.announce.listeners.append(
        lambda event: begun.append(start.exists()) if isinstance(event, StepEnded) else None
    )
    loop.run()
    assert begun == [True]
    assert not start.exists()  # there is a later good state
    assert [event.step for event in of(CheckpointSaved, seen)] == [1]


def test_the_last_good_state_outlives_those_after_steps_left_out(
    tiny_folder: Path, tmp_path: Path
) -> None:
    given = [[[document(i, bad=i == 2)]] for i in range(5)]
    loop, _ = a_loop(given, tiny_folder, tmp_path, checkpoint_every_steps=1)
    loop.settings = replace(loop.settings, save_total_limit=1)
    spoil(loop, float("nan"))
    loop.announce.listeners.append(
        lambda event: loop.stop("SIGTERM") if isinstance(event, StepLeftOut) else None
    )
    loop.run()
    names = [folder.name for folder in complete_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000002", "step-000003"]
