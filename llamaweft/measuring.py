"""What a run measures on, and what is checked before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from llamaweft.data.audit_page import write_audit_page
from llamaweft.data.chat import Document
from llamaweft.data.example import Example
from llamaweft.data.page_input import page_input
from llamaweft.data.pairs import has_chats
from llamaweft.data.targets import REWARD
from llamaweft.errors import UserError
from llamaweft.evaluate.evaluator import Evaluator
from llamaweft.evaluate.head_evaluator import HeadEvaluator
from llamaweft.model.llama import LlamaForCausalLM, LlamaWithHead
from llamaweft.model.pack import Pack
from llamaweft.parallel.ranks import ALONE, Ranks
from llamaweft.pieces.pieces import Pieces
from llamaweft.recipe import Recipe
from llamaweft.settings import Evaluation
from llamaweft.train.events import StopRequest

Measures = Evaluator | HeadEvaluator


class Measuring(Pieces):
    """The pieces of a recipe with its evaluator."""

    def __init__(self, recipe: Recipe, ranks: Ranks = ALONE) -> None:
        super().__init__(recipe, ranks)
        self.stop = StopRequest()
        """Asked to stop, training and its measurements end at the next pack or answers."""

    @cached_property
    def evaluator(self) -> Measures | None:
        """Measures on the held-out rows; None where nothing is held out."""
        if not len(self.data.validation):
            return None
        documents = self.data.validation_documents
        rows = self.data.validation if self.head is None else documents.examples
        return self.evaluator_on(rows, documents)

    def evaluator_on(
        self,
        examples: Sequence[Example],
        documents: Sequence[Document],
        measuring: Evaluation | None = None,
    ) -> Measures:
        """Measures on these rows as the recipe says, or as `measuring` does. With a head, documents
        and rows stand in the same order."""
        measuring = measuring or self.recipe.evaluation
        if self.head is not None:
            return HeadEvaluator(
                task=self.recipe.task,
                metrics=measuring.metrics,
                documents=documents,
                examples=examples,
                tokenizer=self.tokenizer,
                classes=self.data.classes,
                outputs=self.read_documents,
                micro_batch_tokens=self.recipe.training.micro_batch_tokens,
                share=self.ranks.replicas,
            )
        return Evaluator(
            metrics=measuring.metrics,
            documents=documents,
            examples=examples,
            tokenizer=self.tokenizer,
            loss_parts=self._loss_parts,
            max_rows=measuring.max_rows,
            max_new_tokens=measuring.max_new_tokens,
            micro_batch_tokens=self.recipe.training.micro_batch_tokens,
            cache_bytes=self.cache_bytes,
            share=self.ranks.replicas,
        )

    def read_documents(
        self, model: LlamaWithHead, documents: list[Document]
    ) -> list[tuple[Tensor, tuple[float, float]]]:
        """What a head says of each document, as `LlamaWithHead.read` gives it."""
        self.stop.check()
        share = not model.head.reads_all
        return model.read(Pack.from_documents(documents, share=share).to(model.device))

    def _loss_parts(
        self, model: LlamaForCausalLM, documents: list[Document]
    ) -> list[tuple[float, float]]:
        self.stop.check()
        pack = Pack.from_documents(documents, share=True)
        return model.sequence_losses(pack.to(model.device))

    def check_data(self) -> None:
        """Raises UserError when the audit blocks training (a line for each finding), when no row
        is left to train on, or when a metric has no held-out row to be measured on."""
        blocking = self.data.audit.blocking
        if blocking:
            raise UserError(
                "\n".join(
                    f"the audit blocks on {f.check}: {f.count} of {self.data.audit.rows} rows, "
                    f"the first {f.examples[0]}: {f.remedy}"
                    for f in blocking
                )
            )
        if not len(self.data.documents):
            raise UserError("no row is left to train on: data.on_too_long dropped them all")
        self._check_templated()
        if self.evaluator is not None:
            self.evaluator.check()

    def _check_templated(self) -> None:
        """Raises UserError for a chat template that no preference would be written with."""
        template = self.recipe.data.chat_template if self.recipe.task == REWARD else None
        if template is not None and not has_chats(self.data.examples):
            raise UserError(
                f"data.chat_template: {template} writes messages, and every row is plain text, "
                "which is read as it is; write prompt, chosen and rejected as messages, or remove "
                "the key"
            )

    def write_audit_page(self, path: Path) -> None:
        """The audit and the rows behind it, as a page. Raises UserError when `path` cannot be
        written."""
        packs = self.loader.first_packs if len(self.data.documents) else []
        longest = self.recipe.data.max_length_tokens
        title = ", ".join(rows.name for rows in self.recipe.data.train)
        page = page_input(title, self.data, packs, self.tokenizer, longest)
        write_audit_page(page, path)
