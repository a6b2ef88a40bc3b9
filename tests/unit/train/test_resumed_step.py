"""A step that goes on after a stop and runs out of memory is taken again from its own start."""

from __future__ import annotations

from pathlib import Path

import torch
from test_step import a_loop, document, noisy, of, weights

from llamaweft.data.chat import Document
from llamaweft.model.pack import Pack
from llamaweft.train.checkpoint import complete_checkpoints
from llamaweft.train.events import PacksSplit
from llamaweft.train.loop import Loop

GIVEN: list[list[list[Document]]] = [
    [[document(4 * step + i), document(50 + 4 * step + i)] for i in range(4)] for step in range(2)
]


def trained(folder: Path, place: Path, stops: bool, checkpoint: Path | None = None) -> Loop:
    """Memory runs out once in the third pack of the second step; a stop comes in its first."""
    loop, seen = a_loop(GIVEN, folder, place)
    noisy(loop)
    sound, left = loop.objective, [1]

    def objective(pack: Pack):
        where = loop.state.step, loop.state.packs_done
        if stops and where == (1, 0):
            loop.stop("SIGTERM")
        if where == (1, 2) and left:
            left.pop()
            raise MemoryError
        return sound(pack)

    loop.objective = objective
    torch.manual_seed(1 if checkpoint is None else 99)
    if checkpoint is not None:
        loop.resume(checkpoint)
    loop.run()
    assert stops or len(of(PacksSplit, seen)) == 1
    return loop


def test_it_draws_the_random_numbers_of_the_step_that_was_never_stopped(
    tiny_folder: Path, tmp_path: Path
) -> None:
    whole = trained(tiny_folder, tmp_path / "whole", stops=False)
    trained(tiny_folder, tmp_path / "cut", stops=True)
    (checkpoint,) = complete_checkpoints(tmp_path / "cut/checkpoints")
    resumed = trained(tiny_folder, tmp_path / "cut", stops=False, checkpoint=checkpoint)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, resumed.parameters[name]), name
