"""Noticing that another rank is gone, and saying which.

Every rank tells the others that it lives, through the store at which they met: a count that goes
up, and what it is doing. A rank whose count stands still has been killed or cut off. So a run ends
everywhere even where ranks compute for minutes without a word to each other.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

BEAT_SECONDS = 1.0
"""Between two signs of life."""

QUIET = "LLAMAWEFT_LAUNCHED"
"""Set for ranks whose launcher says for all of them which one was lost."""

SILENT_SECONDS = 15.0
"""Without one, after which a rank is taken for lost."""


class Watch:
    """Of the ranks of a run. on_loss: told what to say when one is lost; the default says it and
    ends this process."""

    def __init__(
        self,
        rank: int,
        world: int,
        address: str,
        port: int,
        run: str,
        on_loss: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.world, self.run = rank, world, run
        self.on_loss = on_loss or self._end
        self.doing = "the start"
        """What this rank does, in a word or two."""
        self._beats = 0
        self._mute = False
        self._store = TCPStore(
            address, port, None, is_master=False, timeout=timedelta(seconds=2 * SILENT_SECONDS)
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True, name="watch")

    def start(self) -> None:
        self._beat()
        self._thread.start()

    def speaks(self, what: str) -> bool:
        """Whether this rank is the one to say something, which others may be about to say too."""
        mine = f"{self.rank} {what}"
        try:
            key = f"llamaweft/{self.run}/said"
            said = self._asked(lambda: self._store.compare_set(key, "", mine)).decode()
        except RuntimeError:
            return True
        return said == mine or said.partition(" ")[2] != what

    def stop(self) -> None:
        """This rank is about to leave as it should; no one is to miss it."""
        self._stopped.set()
        self._thread.join(timeout=2 * BEAT_SECONDS)
        try:
            self._asked(lambda: self._store.set(self._key(self.rank), "left"))
        except RuntimeError:  # the store has left before
            return

    def lost(self) -> str | None:
        """After a rank did not answer: which one is gone, or which is behind; None where all live
        and do the same. Takes some seconds, in which a rank that lives gives a sign."""
        try:
            before = self._asked(self._all)
            self._stopped.wait(4 * BEAT_SECONDS)
            after = self._asked(self._all)
        except RuntimeError:
            return self._unreachable
        dead = [r for r in before if before[r] == after[r] != "left" and r != self.rank]
        if dead:
            return self._gone(dead[0], after[dead[0]])
        doing = {rank: beat.partition(" ")[2] for rank, beat in after.items()}
        behind = [r for r, what in doing.items() if what != doing[self.rank] and r != self.rank]
        if behind:
            return (
                f"rank {behind[0]} is at {doing[behind[0]] or 'its end'} while rank {self.rank} "
                f"waits for it at {doing[self.rank]}"
            )
        return None

    # --- signs of life --------------------------------------------------------------------------

    def _key(self, rank: int) -> str:
        return f"llamaweft/{self.run}/{rank}"

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(self._key(self.rank), f"{self._beats} {self.doing}")

    def _all(self) -> dict[int, str]:
        keys = [self._key(rank) for rank in range(self.world)]
        there = [r for r, key in enumerate(keys) if self._store.check([key])]
        found = self._store.multi_get([keys[rank] for rank in there]) if there else []
        return {rank: beat.decode() for rank, beat in zip(there, found, strict=True)}

    def _beat_and_look(self) -> dict[int, str]:
        self._beat()
        return self._all()

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What the store answers. Raises RuntimeError where it does not within SILENT_SECONDS, and
        at once from then on: torch itself waits without end in most calls."""
        answers: queue.SimpleQueue[tuple[Any, RuntimeError | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                answers.put((ask(), None))
            except RuntimeError as error:
                answers.put((None, error))

        if not self._mute:
            threading.Thread(target=call, daemon=True, name="watch-call").start()
            try:
                answer, error = answers.get(timeout=SILENT_SECONDS)
            except queue.Empty:
                self._mute = True
            else:
                if error is not None:
                    raise error
                return answer
        raise RuntimeError("the store does not answer")

    def _live(self) -> None:
        silent = dict.fromkeys(range(self.world), 0.0)
        last: dict[int, str] = {}
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                beats = self._asked(self._beat_and_look)
            except RuntimeError:
                if not self._stopped.is_set():
                    self.on_loss(self._unreachable)
                return
            for rank, beat in beats.items():
                moved = beat != last.get(rank) or beat == "left"
                silent[rank] = 0.0 if moved else silent[rank] + BEAT_SECONDS
                if silent[rank] >= SILENT_SECONDS:
                    self.on_loss(self._gone(rank, beat))
                    return
            last = beats

    # --- words ----------------------------------------------------------------------------------

    @property
    def _unreachable(self) -> str:
        return "rank 0, at which the ranks meet, no longer answers"

    def _gone(self, rank: int, beat: str) -> str:
        return f"rank {rank} no longer answers; it was last heard of at {beat.partition(' ')[2]}"

    def _end(self, what: str) -> None:
        if not os.environ.get(QUIET) and self.speaks(what):
            print(f"error: {ended_by(what)}", file=sys.stderr, flush=True)
        os._exit(1)  # this rank may be waiting for the other in a call that cannot be left


def ended_by(what: str) -> str:
    """A sentence for a person: what happened, and what to do."""
    return f"{what}; the run ends on all ranks, --resume goes on from the newest checkpoint"
