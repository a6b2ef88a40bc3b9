"""A run's trained model, written for other programs and proven there.

What is asked for is checked before anything is loaded. Then, one after the other: what the export
must answer like is computed, the export is written, our model is freed, and the export is opened by
the program that it is for.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamaweft.adapters.folder import save_adapter
from llamaweft.data.chat import stop_ids
from llamaweft.data.targets import HEAD_TASKS
from llamaweft.data.template import ChatTemplate
from llamaweft.errors import UserError
from llamaweft.export.consumers import check_peft, consumer_dtype, in_peft, in_transformers
from llamaweft.export.gguf import QUANTIZATIONS, check_quantization, gguf_bytes, write_gguf
from llamaweft.export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from llamaweft.export.head import in_torch, write_head
from llamaweft.export.hf import described, export_merged, merged_sources
from llamaweft.export.llama_cpp import CHAT, check_llama_cpp, in_llama_cpp
from llamaweft.export.ollama import go_template, stop_texts, write_modelfile
from llamaweft.export.originals import (
    AUTO,
    ORIGINAL,
    hold_originals,
    holds_originals,
    merge_base,
    originals,
)
from llamaweft.export.parity import (
    COMPUTED_IN_BF16,
    TOLERANCES,
    Answers,
    Expected,
    Parity,
    auto_class,
    our_logits,
)
from llamaweft.files import need_disk
from llamaweft.model.llama import LlamaWithHead, Model
from llamaweft.model.locate import base_name
from llamaweft.model.presets import parameter_count
from llamaweft.model.stores import own_codec
from llamaweft.pipeline import Pipeline
from llamaweft.plan.hardware import available_bytes
from llamaweft.runtime import DTYPES

MERGED = ("hf", "gguf", "ollama")
"""Targets that hold the merged model."""

TARGETS = (*MERGED, "peft", "head")
QUANTIZED = ("gguf", "ollama")
DEFAULT_QUANTIZATION = "q8_0"

PARITY_TOKENS = 512
PARITY_TEXTS = 4
"""An export is proven on so many texts, of at most so many tokens each."""


@dataclass(frozen=True)
class Wanted:
    """to: one of TARGETS. merge_into: one of export.originals.MERGES. quantization: of a GGUF;
    None: the usual one. verify: whether the export is opened and compared."""

    to: str
    merge_into: str = AUTO
    quantization: str | None = None
    verify: bool = True


class Export:
    """One export of one run. name: what a file is called after."""

    def __init__(
        self, pipeline: Pipeline, wanted: Wanted, name: str, say: Callable[[str], None]
    ) -> None:
        """Raises UserError for what cannot be exported so, or cannot be proven here."""
        self.pipeline, self.wanted, self.name, self.say = pipeline, wanted, name, say
        self._check_target()
        if wanted.quantization is not None and wanted.to not in QUANTIZED:
            raise UserError(f"--quantization is of a GGUF, and --to {wanted.to} writes none")
        if wanted.merge_into != AUTO and wanted.to not in MERGED:
            raise UserError(f"--merge-into: --to {wanted.to} merges nothing; leave the option out")
        self.quantization = wanted.quantization or DEFAULT_QUANTIZATION
        if wanted.to in MERGED:
            self.base = merge_base(
                wanted.merge_into, self._folder, pipeline.base_weights, pipeline.trains_all
            )
        if wanted.to in QUANTIZED:
            check_quantization(self.quantization, pipeline.config)
            _ = self._gguf_tokenizer
        if wanted.to == "ollama":
            _ = self._template
        if wanted.verify:
            self._check_proof()

    def _check_target(self) -> None:
        pipeline, to = self.pipeline, self.wanted.to
        task = pipeline.recipe.task
        if to not in TARGETS:
            raise UserError(f"--to {to}: give one of {', '.join(TARGETS)}")
        if to == "peft" and pipeline.lora is None:
            raise UserError("this run trained the model itself and no adapter; export --to hf")
        if to == "peft" and task == "question_answering":
            raise UserError(
                "transformers does not find a base model's weights under a head for question "
                "answering, so this adapter could not be opened; export --to hf"
            )
        if to in QUANTIZED and task in HEAD_TASKS:
            raise UserError(
                f"this run was trained with task: {task}, and a GGUF holds a model that predicts "
                "tokens; export --to hf or --to head"
            )
        if to == "head" and task not in HEAD_TASKS:
            raise UserError(
                f"this run was trained with task: {task}, so it has no head of its own; export "
                "--to hf"
            )

    def _check_proof(self) -> None:
        """Raises UserError where the consumer is missing, or the memory for it."""
        to = self.wanted.to
        if to == "peft":
            if own_codec(self._folder) is not None:
                raise UserError(
                    f"{self._folder} holds its weights in a store, which peft does not open, "
                    "so the export cannot be proven; give --no-verify, or export --to hf"
                )
            check_peft()
        if to in QUANTIZED:
            check_llama_cpp()
        if to in ("hf", "peft"):
            _ = self._computes_in

    def write(self, folder: Path) -> Parity | None:
        """Write the export into an empty folder. Returns the proof, passed or not; None without."""
        model = self.pipeline.trained_model()
        write = {
            "hf": self._hf,
            "peft": self._peft,
            "gguf": self._gguf,
            "ollama": self._gguf,
            "head": self._head,
        }[self.wanted.to]
        holder = [model]
        del model  # the writer takes it out, and it is freed before another is opened
        return write(holder, folder)

    # --- what is written --------------------------------------------------------------------------

    def _hf(self, holder: list[Model], folder: Path) -> Parity | None:
        dtype = self._merged_dtype
        size = DTYPES[dtype].itemsize * parameter_count(self.pipeline.config)
        need_disk(folder, size, "the export")
        expected = self._expected(holder[0])
        tokenizer = self.pipeline.tokenizer
        export_merged(holder[0], tokenizer, folder, dtype, stop_ids(tokenizer))
        _free(holder)
        if expected is None:
            return None
        answers = in_transformers(folder, expected.kind, self._computes_in, expected.prompts)
        return expected.beside(answers, _tolerance(f"hf {dtype}", answers))

    def _peft(self, holder: list[Model], folder: Path) -> Parity | None:
        pipeline, (model,) = self.pipeline, holder
        assert pipeline.lora is not None
        expected = self._expected(model)
        head = model.head_config if isinstance(model, LlamaWithHead) else None
        config = model.config
        base = base_name(pipeline.recipe.model, self._folder)
        save_adapter(model, pipeline.lora, base, folder, pipeline.model_commit)
        pipeline.tokenizer.save_pretrained(folder)
        del model
        _free(holder)
        if expected is None:
            return None
        answers = in_peft(
            folder,
            str(self._folder),  # the base itself: its name may stand for another commit by now
            expected.kind,
            pipeline.base_weights,
            config,
            head,
            self._computes_in,
            expected.prompts,
        )
        return expected.beside(answers, _tolerance("peft", answers))

    def _gguf(self, holder: list[Model], folder: Path) -> Parity | None:
        quantization = QUANTIZATIONS[self.quantization]
        expected = self._expected(holder[0])
        config, sources = holder[0].config, list(merged_sources(holder[0]))
        need_disk(folder, gguf_bytes(sources, quantization), "the export")
        path = folder / f"{self.name}-{self.quantization}.gguf"
        write_gguf(path, config, sources, self._gguf_tokenizer, quantization, self.name)
        if self.wanted.to == "ollama":
            tokenizer = self.pipeline.tokenizer
            stops = stop_texts(tokenizer, stop_ids(tokenizer))
            length = config.max_position_embeddings
            write_modelfile(folder, path.name, self._template, stops, length)
        sources.clear()
        _free(holder)
        if expected is None:
            return None
        answers = in_llama_cpp(
            path,
            self.pipeline.tokenizer,
            self._gguf_tokenizer.adds_begin,
            self._chat(CHAT) if self.pipeline.tokenizer.chat_template else None,
            config.vocab_size,
            expected.prompts,
        )
        return expected.beside(answers, _tolerance(f"gguf {self.quantization}", answers))

    def _head(self, holder: list[Model], folder: Path) -> Parity | None:
        (model,) = holder
        assert isinstance(model, LlamaWithHead)
        write_head(model, described(model, self.pipeline.tokenizer), folder)
        expected = self._expected(model)
        if expected is None:
            return None
        answers = in_torch(model, folder, expected.prompts)
        return expected.beside(answers, _tolerance("head", answers))

    # --- what it is compared with -----------------------------------------------------------------

    def _expected(self, model: Model) -> Expected | None:
        """What the export must answer like, with the weights in `model` that are to be merged; None
        where nothing is to be proven."""
        prompts = parity_prompts(self.pipeline) if self.wanted.verify else []
        rows = our_logits(model, prompts)
        live = None
        if self.wanted.to in MERGED and self._takes_originals(model):
            live, rows = rows, our_logits(model, prompts)
        if not self.wanted.verify:
            return None
        merged_into = self.base if self.wanted.to in MERGED else None
        return Expected(prompts, auto_class(model), rows, live, merged_into)

    def _takes_originals(self, model: Model) -> bool:
        """Put the original weights into a model, where it is to be merged into them and holds
        others. Returns whether it did."""
        codec = self.pipeline.base_weights
        if self.base is None:
            return False
        if self.base != ORIGINAL:
            self.say(f"merging into the weights as they were held in training: {codec}")
            return False
        self.say(f"merging into the original weights in {self._folder}")
        tensors = originals(self._folder)
        if holds_originals(tensors, codec):
            return False
        hold_originals(model, tensors)
        return True

    # --- pieces -----------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        return self.pipeline.model_folder

    @property
    def _merged_dtype(self) -> str:
        return "fp32" if self.pipeline.base_weights == "fp32" else "bf16"

    @cached_property
    def _computes_in(self) -> str:
        """What transformers computes the proof in."""
        free = available_bytes(torch.device("cpu"))
        config = self.pipeline.config
        return consumer_dtype(config, self._merged_dtype, free, self._training_bytes)

    @property
    def _training_bytes(self) -> int | None:
        """What training took of this machine's memory, as it was planned: the proof is not to take
        more. None where that was a GPU's, or nothing was planned."""
        plan = self.pipeline.run_folder.plan
        if self.pipeline.runtime.device.type != "cpu" or not plan.exists():
            return None
        return int(json.loads(plan.read_text(encoding="utf-8"))["peak_bytes"])

    @cached_property
    def _gguf_tokenizer(self) -> GgufTokenizer:
        tokenizer = self.pipeline.tokenizer
        chat = self._chat(CHAT) if tokenizer.chat_template else None
        return gguf_tokenizer(tokenizer, self.pipeline.config.vocab_size, stop_ids(tokenizer), chat)

    @cached_property
    def _template(self) -> str:
        """Ollama's template."""
        tokenizer = self.pipeline.tokenizer
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template, and Ollama talks in "
                "chats; export --to gguf"
            )
        begin = tokenizer.bos_token if self._gguf_tokenizer.adds_begin else None
        source = tokenizer.get_chat_template()
        return go_template(self._chat, begin, source, str(tokenizer.name_or_path))

    def _chat(self, messages: Any) -> str:
        """A chat as the tokenizer's template writes it, up to the next answer."""
        template = ChatTemplate(self.pipeline.tokenizer)
        return template.render(list(messages), "a chat of the proof", prompt=True)[0]


def _free(holder: list[Model]) -> None:
    """Let go of a model that nothing else holds."""
    holder.clear()
    gc.collect()


def _tolerance(name: str, answers: Answers) -> float:
    return COMPUTED_IN_BF16 if answers.computed_in == "bf16" else TOLERANCES[name]


def parity_prompts(pipeline: Pipeline) -> list[np.ndarray]:
    """Token ids of a few held-out documents (training ones where none are held out)."""
    documents = pipeline.data.validation_documents or pipeline.data.documents
    texts = [text for document in documents[:PARITY_TEXTS] for text in document.texts]
    return [ids[:PARITY_TOKENS] for ids in texts[:PARITY_TEXTS]]
