"""A file of prompts in, a file of answers out: in the order of the prompts, and resumable.

A model that writes text answers in words; one with a head says what the head says of each row.
Answers are kept, group by group, in a file beside the output whose first line says what they answer
to; the output takes its place, without that line, when all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llamaweft.data.chat import Document, Encoder, stop_ids
from llamaweft.data.example import Example
from llamaweft.data.formats import to_inputs, to_prompts
from llamaweft.data.rows import Row
from llamaweft.data.targets import HEAD_TASKS, REWARD, TargetEncoder
from llamaweft.errors import UserError
from llamaweft.evaluate.head_answers import head_answer
from llamaweft.files import write_text
from llamaweft.generate.generate import generate_batch
from llamaweft.model.llama import LlamaWithHead
from llamaweft.pipeline import open_run
from llamaweft.subject import Subject

GROUP_ROWS = 256
"""Prompts that are answered, sorted by length, before their answers are written."""

MAX_NEW_TOKENS = 512
"""Of an answer in words, where nobody says."""

Progress = Callable[[int, int], None]
Answerer = Callable[[range, Callable[[int], None]], list[dict[str, Any]]]
"""Rows by their places, and whom to tell how many are answered -> what is written of each beside
its number."""


@dataclass(frozen=True)
class Prediction:
    """finish: `stop`, or `length` where the answer was cut."""

    messages: tuple[dict[str, str], ...]
    answer: str
    finish: str


def read_prompts(subject: str, rows: Iterable[Row], max_new_tokens: int | None) -> list[Example]:
    """The rows as what `subject` is reads them. Raises UserError, naming the row, for one that
    cannot be read, for a task whose head is not asked here, and for a length of answers where none
    are written."""
    run = open_run(subject)
    task = None if run is None else run.recipe.task
    if task not in HEAD_TASKS:
        return to_prompts(rows)
    if task == REWARD:
        raise UserError(
            f"{subject} was trained with task: {task}, and predict does not give rewards; measure "
            "it with `llamaweft evaluate`, or export it"
        )
    if max_new_tokens is not None:
        raise UserError(
            f"--max-new-tokens: {subject} was trained with task: {task}, so it writes no text; "
            "leave the option out"
        )
    return to_inputs(rows, task)


def predict(
    subject: Subject,
    prompts: Sequence[Example],
    output: Path,
    *,
    max_new_tokens: int | None = None,
    resume: bool = False,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write the greedy answer to each prompt, or what a head says of it, as a line of JSON; returns
    how many this call made.

    prompts: as `read_prompts` gives them. max_new_tokens: of an answer in words; None: 512.
    resume: go on with what an earlier call left. Raises UserError for a prompt that is too long
    (before anything is answered), an output that is there already, and unfinished answers that
    belong to other prompts or settings.
    """
    if output.exists():
        raise UserError(f"{output} exists; give another --output, or remove it")
    if isinstance(subject.model, LlamaWithHead):
        answer = _reader(subject, subject.model, prompts)
    else:
        max_new_tokens = max_new_tokens or MAX_NEW_TOKENS
        answer = _writer(subject, prompts, max_new_tokens)
    unfinished = output.with_name(f"{output.name}.unfinished")
    head = json.dumps(_settings(subject, prompts, max_new_tokens))
    done = _go_on(unfinished, head, resume)
    with unfinished.open("a", encoding="utf-8") as file:
        if done == 0 and file.tell() == 0:
            file.write(head + "\n")
        for first in range(done, len(prompts), GROUP_ROWS):
            rows = range(first, min(first + GROUP_ROWS, len(prompts)))
            progress(first, len(prompts))
            answers = answer(rows, partial(_advance, progress, first, len(prompts)))
            for row, said in zip(rows, answers, strict=True):
                file.write(json.dumps({"row": row + 1} | said, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    write_text(output, unfinished.read_text(encoding="utf-8").partition("\n")[2])
    unfinished.unlink()
    return len(prompts) - done


def _advance(progress: Progress, before: int, total: int, count: int) -> None:
    progress(before + count, total)


# --- answers in words -----------------------------------------------------------------------------


def _writer(subject: Subject, prompts: Sequence[Example], max_new_tokens: int) -> Answerer:
    tokenizer, ids = subject.pipeline.tokenizer, _encoded(subject, prompts)

    def answer(rows: range, told: Callable[[int], None]) -> list[dict[str, Any]]:
        found = generate_batch(
            subject.generates,
            [ids[row] for row in rows],
            stop_ids(tokenizer),
            max_new_tokens=max_new_tokens,
            cache_bytes=subject.pipeline.cache_bytes(),
            progress=told,
        )
        texts = [tokenizer.decode(one.ids, skip_special_tokens=True) for one in found]
        return [
            asdict(Prediction(prompts[row].messages, text, one.finish))
            for row, text, one in zip(rows, texts, found, strict=True)
        ]

    return answer


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


# --- what a head says -----------------------------------------------------------------------------


def _reader(subject: Subject, model: LlamaWithHead, prompts: Sequence[Example]) -> Answerer:
    pipeline, documents = subject.pipeline, _documents(subject, prompts)
    capacity = pipeline.recipe.training.micro_batch_tokens
    classes, task = pipeline.data.classes, pipeline.recipe.task

    @torch.inference_mode()
    def answer(rows: range, told: Callable[[int], None]) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for batch in _batches(rows, documents, capacity):
            read = pipeline.read_documents(model, [documents[row] for row in batch])
            for row, (logits, _) in zip(batch, read, strict=True):
                logits = logits.float().cpu()
                found[row] = head_answer(task, classes, pipeline.tokenizer, prompts[row], logits)
            told(len(found))
        return [found[row] for row in rows]

    return answer


def _batches(rows: range, documents: Sequence[Document], capacity: int) -> list[list[int]]:
    """Rows of like length, at most `capacity` tokens together, or one row."""
    batches: list[list[int]] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: len(documents[row].ids)):
        tokens += len(documents[row].ids)
        if batches and tokens <= capacity:
            batches[-1].append(row)
        else:
            batches.append([row])
            tokens = len(documents[row].ids)
    return batches


def _documents(subject: Subject, prompts: Sequence[Example]) -> list[Document]:
    """As training read rows: cut where data.on_too_long says truncate, tags excepted."""
    recipe = subject.pipeline.recipe
    longest = recipe.data.max_length_tokens
    cut = recipe.data.on_too_long == "truncate" and recipe.task != "token_classification"
    found = []
    for document in TargetEncoder(subject.pipeline.tokenizer, recipe.task)(prompts):
        count = len(document.ids)
        if count > longest and not cut:
            raise UserError(
                f"{document.where} has {count} tokens, and the run read at most "
                f"data.max_length_tokens: {longest}; shorten it"
            )
        found.append(document.part(0, longest) if count > longest else document)
    return found


# --- going on -------------------------------------------------------------------------------------


def _settings(
    subject: Subject, prompts: Sequence[Example], max_new_tokens: int | None
) -> dict[str, Any]:
    """What answers depend on."""
    asked = [prompt.key if prompt.target else prompt.messages for prompt in prompts]
    said = json.dumps(asked, ensure_ascii=False)
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
