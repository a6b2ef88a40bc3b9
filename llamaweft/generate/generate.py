"""Answers from prompts: batched for evaluation, streamed for a chat.

B: sequences
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llamaweft.errors import UserError
from llamaweft.generate.kv_cache import Decode, KVCache, Prefill
from llamaweft.generate.sampling import Sampling, sample
from llamaweft.model.llama import LlamaForCausalLM
from llamaweft.model.pack import Pack
from llamaweft.prefixes import prefix_tree

CACHE_BYTES = 256 * 2**20
"""Keys and values that a batch may hold, where nobody says; it decides how many sequences are
answered together."""

PREFILL_TOKENS = 2048
"""Tokens of prompts that are read at once; more make no product faster."""

LARGEST_BATCH = 128


@dataclass(frozen=True)
class Answer:
    """Token ids without the stop token. finish: `stop`, or `length` where room ended."""

    ids: list[int]
    finish: str


class _Prompt:
    """A document without labels."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = np.asarray(ids, dtype=np.int64)
        self.weights = np.zeros(len(self.ids), np.float32)


class Session:
    """A cache with its model: feed tokens, get the logits of what follows each row."""

    def __init__(self, model: LlamaForCausalLM, batch: int, room: int) -> None:
        self.model, self.room = model, room
        dtype = model.model.compute_dtype
        self.cache = KVCache(model.config, model.key_value_heads, batch, room, dtype, model.device)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """logits_BV after each prompt. Nothing is padded: prompts are packs, and what they begin
        with in common is computed once."""
        return torch.cat([self._prefill(first, group) for first, group in _groups(prompts)])

    def _prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        documents = [_Prompt(ids) for ids in prompts]
        device = self.model.device
        pack = Pack.from_documents(documents, share=True).to(device)
        tree = prefix_tree([document.ids for document in documents])
        places = [torch.from_numpy(tree.places(b)).to(device) for b in range(len(prompts))]
        attend = Prefill(self.cache, pack, places, first)
        hidden_TE = self.model.model(pack.ids_T, pack.positions_T + attend.before, attend)
        attend.finish()
        return self.model.lm_head(hidden_TE[torch.stack([of_row[-1] for of_row in places])])

    def decode(self, ids_B: Tensor) -> Tensor:
        """logits_BV after one more token in each row."""
        attend = Decode(self.cache)
        hidden_BE = self.model.model(ids_B, self.cache.used_B, attend)
        attend.finish()
        return self.model.lm_head(hidden_BE)


def _groups(prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
    """(place of the first, prompts) of at most PREFILL_TOKENS, or of one prompt."""
    first = tokens = 0
    for place, prompt in enumerate(prompts):
        if place > first and tokens + len(prompt) > PREFILL_TOKENS:
            yield first, prompts[first:place]
            first, tokens = place, 0
        tokens += len(prompt)
    yield first, prompts[first:]


@torch.inference_mode()
def generate_batch(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    stop_ids: set[int],
    *,
    max_new_tokens: int,
    cache_bytes: int = CACHE_BYTES,
    progress: Callable[[int], None] | None = None,
    is_complete: Callable[[Sequence[int]], bool] | None = None,
) -> list[Answer]:
    """The greedy answer to each prompt, in the given order.

    Prompts of like length share a batch; a finished sequence leaves it. An answer has
    `max_new_tokens` at most, and ends where the model's context does. cache_bytes: of keys and
    values held at once. progress: called for every token with the prompts
    of the batches that are finished; what it raises ends the generation. is_complete: whether
    an answer ends with the last of these tokens, which are part of it.
    """
    context = model.config.max_position_embeddings
    most = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    finish = ["length"] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    finished = 0
    rooms = [len(prompts[i]) + most[i] for i in order]
    for rows in _batches(model, order, rooms, cache_bytes):
        batch = len(rows)
        session = Session(model, len(rows), max(len(prompts[i]) + most[i] for i in rows))
        logits_BV = session.prefill([prompts[i] for i in rows])
        while rows:
            ids_B = logits_BV.argmax(dim=-1)
            alive = []
            for place, (row, token) in enumerate(zip(rows, ids_B.tolist(), strict=True)):
                if token in stop_ids:
                    finish[row] = "stop"
                    continue
                answers[row].append(token)
                if is_complete is not None and is_complete(answers[row]):
                    finish[row] = "stop"
                elif len(answers[row]) < most[row]:
                    alive.append(place)
            if len(alive) < len(rows):
                rows = [rows[place] for place in alive]
                kept = torch.tensor(alive, dtype=torch.int64, device=ids_B.device)
                session.cache.keep(kept)
                ids_B = ids_B[kept]
            if rows:
                logits_BV = session.decode(ids_B)
                if progress is not None:
                    progress(finished)
        finished += batch
        if progress is not None:
            progress(finished)
    return [Answer(ids, end) for ids, end in zip(answers, finish, strict=True)]


def _batches(
    model: LlamaForCausalLM, order: list[int], rooms: list[int], cache_bytes: int
) -> list[list[int]]:
    """Cut `order`, sorted by room, into batches whose caches hold at most cache_bytes."""
    config = model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    position_bytes = 2 * heads * config.head_dim * model.model.compute_dtype.itemsize
    batches: list[list[int]] = []
    for row, room in zip(order, rooms, strict=True):
        batch = batches[-1] if batches else []
        full = (len(batch) + 1) * room * position_bytes > cache_bytes
        if not batch or full or len(batch) == LARGEST_BATCH:
            batches.append([row])
        else:
            batch.append(row)
    return batches


@torch.inference_mode()
def generate_stream(
    session: Session,
    prompt: Sequence[int],
    stop_ids: set[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The answer's tokens one by one, without the stop token. `prompt` continues what the
    session holds. Raises UserError when the prompt does not fit."""
    used = int(session.cache.used_B.max())
    left = session.room - used - len(prompt)
    if left < 1:
        raise UserError(
            f"the chat has {used + len(prompt)} tokens and there is room for {session.room}; "
            "start a new one with /new"
        )
    logits_BV = session.prefill([prompt])
    for _ in range(min(max_new_tokens, left)):
        ids_B = sample(logits_BV, sampling, generator)
        if int(ids_B) in stop_ids:
            return
        yield int(ids_B)
        logits_BV = session.decode(ids_B)
