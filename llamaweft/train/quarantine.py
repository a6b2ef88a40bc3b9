"""quarantine.jsonl: what the guard left out, and why; what it did about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamaweft.files import write_text
from llamaweft.train.events import Event, PacksSplit, RankLags, StepLeftOut, WentBack
from llamaweft.train.run_folder import text_of


class QuarantineFile:
    """A listener that appends a line for each step that was left out, with its rows, and for each
    return to a checkpoint, flushed. There is no file before the first.

    describe: a document -> what the file keeps of it. records: lines that the run had written when
    the state was saved that it goes on from; later ones are dropped, since they come again.
    """

    def __init__(
        self, path: Path, describe: Callable[[Any], dict[str, Any]], records: int = 0
    ) -> None:
        self.path, self.describe = path, describe
        if path.exists():
            kept = text_of(path).splitlines(keepends=True)[:records]
            write_text(path, "".join(kept))

    def __call__(self, event: Event) -> None:
        match event:
            case StepLeftOut(step=step, reason=reason, documents=documents):
                rows = [self.describe(document) for document in documents]
                self._append({"step": step, "left_out_because": reason, "rows": rows})
            case WentBack(step=step, to_step=to_step, learning_rate_factor=factor):
                self._append(
                    {"step": step, "went_back_to_step": to_step, "learning_rate_factor": factor}
                )

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def said_of(event: Event) -> str | None:
    """What a person should be told of an event of the guard; None of any other."""
    match event:
        case StepLeftOut(step=step, reason=reason, documents=documents):
            rows = ", ".join(dict.fromkeys(str(document.where) for document in documents[:3]))
            more = f" and {len(documents) - 3} more" if len(documents) > 3 else ""
            return f"step {step} was left out: {reason}; rows: {rows}{more} (quarantine.jsonl)"
        case WentBack(step=step, to_step=to_step, learning_rate_factor=factor):
            return (
                f"after step {step} the run went back to step {to_step}; the learning rate is "
                f"multiplied by {factor:g} from there on"
            )
        case PacksSplit(step=step, over_tokens=tokens, reason=reason):
            return (
                f"memory ran out in step {step + 1} ({reason}); packs of more than {tokens} tokens "
                "are computed in parts from here on, with the same result"
            )
        case RankLags(step=step, rank=rank, times=times):
            return (
                f"rank {rank} keeps the others waiting: it took {times:.1f} times as long as the "
                f"middle one in the steps up to {step}; look at what else runs there"
            )
    return None
