"""A rank that no longer gives signs of life is found, and only one that does not."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from llamaweft.parallel import watch as module
from llamaweft.parallel.watch import Watch


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch):
    """Two ranks that watch each other, ten times as impatient; what each says when one is lost."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "SILENT_SECONDS", 1.5)
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    said: list[list[str]] = [[], []]
    made = [
        Watch(rank, 2, "127.0.0.1", store.port, "0", on_loss=said[rank].append) for rank in range(2)
    ]
    for one in made:
        one.start()
    yield made, said
    for one in made:
        one.stop()
    del store


def wait_until(holds) -> bool:
    for _ in range(100):
        if holds():
            return True
        time.sleep(0.1)
    return False


def test_a_silent_rank_is_named_with_its_place(watches) -> None:
    (first, second), said = watches
    second.doing = "step 7"
    time.sleep(0.5)
    assert first.lost() is None or "rank 1 is at step 7" in str(first.lost())
    second._stopped.set()  # as if it had been killed
    assert wait_until(lambda: said[0])
    assert said[0] == ["rank 1 no longer answers; it was last heard of at step 7"]
    assert "rank 1 no longer answers" in str(first.lost())
    assert not said[1]


def test_a_rank_that_leaves_is_not_missed(watches) -> None:
    (first, second), said = watches
    second.stop()
    time.sleep(3)
    assert said == [[], []]
    assert first.lost() == "rank 1 is at its end while rank 0 waits for it at the start"


def test_a_rank_that_is_behind_is_named(watches) -> None:
    (first, second), _ = watches
    first.doing, second.doing = "step 9", "the validation after step 4"
    time.sleep(0.5)
    assert first.lost() == (
        "rank 1 is at the validation after step 4 while rank 0 waits for it at step 9"
    )


def test_one_rank_speaks_for_those_that_say_the_same(watches) -> None:
    (first, second), _ = watches
    assert first.speaks("there is no file")
    assert not second.speaks("there is no file")
    assert second.speaks("the disk is full")
