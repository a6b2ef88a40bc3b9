"""A conversation with a model: the template's text, the cache, the answer as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llamaweft.errors import UserError
from llamaweft.generate.generate import Session, generate_stream
from llamaweft.generate.sampling import Sampling
from llamaweft.model.llama import LlamaForCausalLM
from llamaweft.templates.render import TemplateFailedError, renderer


class Chat:
    """Keeps the messages and what the model has read of them."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: Any,
        *,
        stop_ids: set[int],
        system: str | None,
        max_new_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None = None,
        room: int = 4096,
    ) -> None:
        """room: tokens that the cache holds, at most the model's context.
        Raises UserError when the tokenizer has no chat template."""
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template, so there is no "
                "chat; use an instruct model or a run that was trained on chats"
            )
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self.system, self.max_new_tokens = system, max_new_tokens
        self.sampling, self.generator = sampling, generator
        self.room = min(room, model.config.max_position_embeddings)
        self.restart()

    def restart(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self._forget()

    def _forget(self) -> None:
        self.session = Session(self.model, 1, self.room)
        self.read: list[int] = []

    def _prompt_ids(self) -> list[int]:
        """The conversation up to where the answer begins. Raises UserError where the template
        refuses it."""
        try:
            (written,) = renderer().render(
                self.tokenizer.get_chat_template(),
                [self.messages],
                variables=dict(self.tokenizer.special_tokens_map),
                prompt=True,
            )
        except TemplateFailedError as error:
            raise UserError(f"the chat template of {self.tokenizer.name_or_path} {error}") from None
        ids: list[int] = self.tokenizer(written.text, add_special_tokens=False)["input_ids"]
        return ids

    def ask(self, text: str) -> Iterator[str]:
        """Say something; yields the answer's text piece by piece.

        Raises UserError when the conversation no longer fits; it goes on as before the question.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._prompt_ids()
        except UserError:
            self.messages.pop()
            raise
        if ids[: len(self.read)] != self.read:  # the answer is tokenised otherwise than it was said
            self._forget()
        fresh = ids[len(self.read) :]
        answer: list[int] = []
        shown = ""
        try:
            for token in generate_stream(
                self.session,
                fresh,
                self.stop_ids,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                generator=self.generator,
            ):
                answer.append(token)
                whole = self.tokenizer.decode(answer, skip_special_tokens=True)
                if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
                    yield whole[len(shown) :]
                    shown = whole
        except UserError:
            self.messages.pop()
            raise
        self.read = ids + answer[: int(self.session.cache.used_B[0]) - len(ids)]
        content = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": content})
