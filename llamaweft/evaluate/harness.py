"""A model as lm-evaluation-harness sees it: texts in, log-probabilities and answers out.

The rules are those of the harness' own class for Hugging Face models (`HFLM`, lm_eval 0.4.13): how
a context and its continuation become tokens, what is cut where a text is too long, where an answer
ends. So the numbers are its numbers. Importing this needs lm_eval, and takes seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llamaweft.data.chat import Document, Tokenizer, stop_ids
from llamaweft.errors import UserError
from llamaweft.evaluate.evaluator import Progress
from llamaweft.generate.generate import generate_batch
from llamaweft.templates.render import (
    TemplateFailedError,
    TemplateRefusedError,
    renderer,
)

NEXT_TOKEN = np.dtype([("position", "<i4"), ("target", "<i8"), ("weight", "<f4")])
"""A token, and the place in a document whose output predicts it."""

LONGEST_ANSWER_TOKENS = 256
"""Where a task does not say; the harness' own."""

LOOK_BACK_TOKENS = 2
"""A text that ends an answer is looked for in so many tokens more than it has itself, since it can
be cut into tokens in other ways."""

GREEDY_ANYWAY = {"num_beams": 1, "repetition_penalty": 1.0}
"""Options of generation that change nothing at these values."""
ONLY_FOR_SAMPLING = {"do_sample", "temperature", "top_p", "top_k"}

END_MARK = "\ue000"
"""A private character, for the end of a message that goes on."""

Score = tuple[float, bool]
"""Log-probability in nats, and whether each token was the likeliest."""


class HarnessModel(TemplateLM):
    """model: one that answers in words. score: model, documents with labels of NEXT_TOKEN ->
    for each document the Score of its labels. cache_bytes: tells, when answers are generated, how
    much their keys and values may take. progress: told how many requests of one kind are done.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        score: Callable[[Any, Sequence[Document], Progress], list[Score]],
        cache_bytes: Callable[[], int],
        progress: Progress,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.score, self.cache_bytes, self.progress = score, cache_bytes, progress
        self.max_length = int(model.config.max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError("--tasks: the model's tokenizer has no token that ends a text")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; the tokenizer's begin of text is not put before one that has it already."""
        if add_special_tokens is None:
            first = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, first)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text, which ends with an answer's header or with what the last message says. A
        template that has no place for a system message gets none. Raises UserError where it
        refuses the chat."""
        try:
            return self._written(chat_history, add_generation_prompt)
        except TemplateRefusedError:
            without = [one for one in chat_history if one["role"] != "system"]
        except TemplateFailedError as error:
            raise UserError(f"the chat template of {self.tokenizer_name} {error}") from None
        try:
            return self._written(without, add_generation_prompt)
        except TemplateFailedError as error:
            raise UserError(f"the chat template of {self.tokenizer_name} {error}") from None

    def _written(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if not add_generation_prompt:  # what comes after its end mark goes
            *before, last = chat
            chat = [*before, last | {"content": f"{last['content']}{END_MARK} "}]
        (written,) = renderer().render(
            self.tokenizer.get_chat_template(),
            [chat],
            variables=dict(self.tokenizer.special_tokens_map),
            prompt=add_generation_prompt,
        )
        if add_generation_prompt:
            return written.text
        text, mark, rest = written.text.rpartition(END_MARK)
        if not mark:
            raise TemplateRefusedError("does not write the last message, which is to go on")
        return text if rest.startswith(" ") else text.rstrip()  # it strips what messages say

    # --- log-probabilities -----------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Score]:
        """The Score of each continuation after its context."""
        for request in requests:
            context, continuation = request.args
            if not continuation:
                raise _nothing_to_score(context)
        found: list[Score] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of each whole text, window by window where it is longer than the
        model's context; each token counts once."""
        windows, of_window = [], []
        for index, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((("", ""), context, continuation))
                of_window.append(index)
        sums = [0.0] * len(requests)
        for index, (logprob, _) in zip(of_window, self._loglikelihood_tokens(windows), strict=True):
            sums[index] += logprob
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Score]:
        documents = [
            self._document(context, ids, continuation)
            for (context, _), ids, continuation in requests
        ]
        return self.score(self.model, documents, self.progress) if documents else []

    def _document(self, context: str, context_ids: list[int], continuation: list[int]) -> Document:
        """All that the model reads, from the left cut to its context. The last token is read by
        nobody, so continuations of one token are the same document and computed once."""
        if not continuation:
            raise _nothing_to_score(context)
        if len(continuation) > self.max_length:
            raise UserError(
                f"--tasks: a continuation of {len(continuation)} tokens is longer than the model's "
                f"context of {self.max_length}, after {context[-40:]!r}; leave the task out"
            )
        whole = [*context_ids, *continuation][-(self.max_length + 1) :]
        count = len(continuation)
        labels = np.zeros(count, NEXT_TOKEN)
        labels["position"] = np.arange(len(whole) - 1 - count, len(whole) - 1)
        labels["target"], labels["weight"] = continuation, 1
        ids = np.array(whole[:-1], np.int32)
        return Document(ids, np.zeros(len(ids), np.float32), "", labels)

    # --- answers ---------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The greedy answer to each text, up to where one of the request's texts would begin."""
        groups: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            until, most = greedy_options(request.args[1], str(request.task_name))
            groups[tuple(until), most].append(index)
        answers = [""] * len(requests)
        done = 0
        for (ends, most), rows in groups.items():
            contexts = [requests[row].args[0] for row in rows]
            texts = self._answers(contexts, list(ends), most, done, len(requests))
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
            done += len(rows)
        return answers

    def _answers(
        self, contexts: list[str], until: list[str], most: int, done: int, total: int
    ) -> list[str]:
        room = self.max_length - most
        if room < 1:
            raise UserError(
                f"--tasks: answers of {most} tokens leave no room for a prompt in the model's "
                f"context of {self.max_length}; leave the task out"
            )
        until = handle_stop_sequences(until, eos=self.tokenizer.decode(self.eot_token_id))
        found = generate_batch(
            self.model,
            [self._prompt(context)[-room:] for context in contexts],
            stop_ids(self.tokenizer),
            max_new_tokens=most,
            cache_bytes=self.cache_bytes(),
            progress=lambda count: self.progress(done + count, total),
            is_complete=self._completion(until),
        )
        texts = [self.tokenizer.decode(one.ids, skip_special_tokens=True) for one in found]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _prompt(self, context: str) -> list[int]:
        first = self.tokenizer.bos_token
        add = not has_bos_prefix(context, first)
        return list(self.tokenizer.encode(context, add_special_tokens=add))

    def _completion(self, until: list[str]) -> Callable[[Sequence[int]], bool]:
        """Whether one of the texts that end an answer is at its end."""
        texts = [text for text in until if text]
        sizes = [len(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        tail = max(sizes, default=0) + LOOK_BACK_TOKENS

        def is_complete(ids: Sequence[int]) -> bool:
            end = self.tokenizer.decode(ids[-tail:])
            return any(text in end for text in texts)

        return is_complete


def greedy_options(given: dict[str, Any], task: str) -> tuple[list[str], int]:
    """(texts that end an answer, its most tokens). Raises UserError for answers that are not the
    greedy ones, which alone are generated here."""
    options = dict(normalize_gen_kwargs(given, LONGEST_ANSWER_TOKENS))
    until, most = options.pop("until"), options.pop("max_gen_toks")
    if options.get("do_sample"):
        raise UserError(
            f"--tasks: {task} draws its answers at random (do_sample), and only greedy answers are "
            "measured; leave it out, or give a copy of the task without it in --include-path"
        )
    for name, value in options.items():
        if name not in ONLY_FOR_SAMPLING and value != GREEDY_ANYWAY.get(name):
            raise UserError(
                f"--tasks: {task} wants {name}: {value} of its answers, which is not known here; "
                "leave it out, or give a copy of the task without it in --include-path"
            )
    return list(until), int(most)


def _nothing_to_score(context: str) -> UserError:
    return UserError(
        f"--tasks: a row has a continuation without a token, after {context[-40:]!r}; mend the "
        "task, or leave it out"
    )
