"""A file of prompts in, a file of answers out: in the order of the prompts, and resumable.

Answers are kept, group by group, in a file beside the output whose first line says what they answer
to; the output takes its place, without that line, when all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llamaweft.data.chat import Encoder, stop_ids
from llamaweft.data.example import Example
from llamaweft.errors import UserError
from llamaweft.files import write_text
from llamaweft.generate.generate import generate_batch
from llamaweft.subject import Subject

GROUP_ROWS = 256
"""Prompts that are answered, sorted by length, before their answers are written."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prediction:
    """row: of the prompts, from 1. finish: `stop`, or `length` where the answer was cut."""

    row: int
    messages: tuple[dict[str, str], ...]
    answer: str
    finish: str


def predict(
    subject: Subject,
    prompts: Sequence[Example],
    output: Path,
    *,
    max_new_tokens: int,
    resume: bool = False,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write the greedy answer to each prompt as a line of JSON; returns how many this call made.

    resume: go on with what an earlier call left. Raises UserError for a prompt that the model's
    context has no room for (before anything is answered), an output that is there already,
    unfinished answers that belong to other prompts or settings, and a model that writes no text.
    """
    model = subject.generates
    if output.exists():
        raise UserError(f"{output} exists; give another --output, or remove it")
    ids = _encoded(subject, prompts)
    unfinished = output.with_name(f"{output.name}.unfinished")
    head = json.dumps(_settings(subject, prompts, max_new_tokens))
    done = _go_on(unfinished, head, resume)
    tokenizer = subject.pipeline.tokenizer
    with unfinished.open("a", encoding="utf-8") as file:
        if done == 0 and file.tell() == 0:
            file.write(head + "\n")
        for first in range(done, len(prompts), GROUP_ROWS):
            rows = range(first, min(first + GROUP_ROWS, len(prompts)))
            progress(first, len(prompts))
            answers = generate_batch(
                model,
                [ids[row] for row in rows],
                stop_ids(tokenizer),
                max_new_tokens=max_new_tokens,
                cache_bytes=subject.pipeline.cache_bytes(),
                progress=partial(_advance, progress, first, len(prompts)),
            )
            for row, answer in zip(rows, answers, strict=True):
                text = tokenizer.decode(answer.ids, skip_special_tokens=True)
                found = Prediction(row + 1, prompts[row].messages, text, answer.finish)
                file.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    write_text(output, unfinished.read_text(encoding="utf-8").partition("\n")[2])
    unfinished.unlink()
    return len(prompts) - done


def _advance(progress: Progress, before: int, total: int, count: int) -> None:
    progress(before + count, total)


def _encoded(subject: Subject, prompts: Sequence[Example]) -> list[list[int]]:
    context = subject.model.config.max_position_embeddings
    encoder = Encoder(subject.pipeline.tokenizer)
    found = []
    for prompt in prompts:
        ids = encoder.prompt_ids(prompt)
        if len(ids) >= context:
            raise UserError(
                f"{prompt.where}: the prompt has {len(ids)} tokens, and the model's context of "
                f"{context} leaves no room for an answer; shorten it"
            )
        found.append(ids)
    return found


def _settings(subject: Subject, prompts: Sequence[Example], max_new_tokens: int) -> dict[str, Any]:
    """What answers depend on."""
    said = json.dumps([prompt.messages for prompt in prompts], ensure_ascii=False)
    return {
        "subject": subject.name,
        "prompts": hashlib.sha256(said.encode()).hexdigest(),
        "max_new_tokens": max_new_tokens,
    }


def _go_on(unfinished: Path, head: str, resume: bool) -> int:
    """How many prompts an earlier call has answered; what it left half-written is cut off."""
    if not unfinished.exists():
        return 0
    if not resume:
        raise UserError(
            f"{unfinished} holds answers of a call that was stopped; go on with --resume, "
            "or remove it"
        )
    content = unfinished.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.splitlines()
    if lines and lines[0].decode() != head:
        raise UserError(
            f"{unfinished} answers other prompts, of another model or with other options; "
            "give those, or remove it"
        )
    with unfinished.open("r+b") as file:
        file.truncate(len(whole))
    return max(0, len(lines) - 1)
