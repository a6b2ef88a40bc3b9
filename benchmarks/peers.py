"""The peer: trl's SFTTrainer with peft's LoRA and, where asked for, bitsandbytes' NF4.

It runs the trainer's own loop; a callback waits at the end of each optimizer step. Rows come
tokenised and labelled, so it trains exactly the tokens that llamaweft trains. Three modes:

- defaults: what QLoRA's recipes say. NF4 with double quantisation, padded batches, gradient
  checkpointing. Only the compute dtype is not theirs.
- packed: packs by `bfd` without padding.
- grouped: rows of like length in a batch, padded.

The base computes in fp32, or in bf16 where that is asked for; adapters in fp32: trl makes those
bf16 beside NF4, which a CPU multiplies slowly in products as thin as LoRA's. Attention is `sdpa`:
the only one that a CPU has that is fast, trains and keeps packed documents apart (transformers
makes a block-diagonal mask from the positions that trl gives it; flash attention needs a GPU, flex
attention on a CPU does not train).

    python -m benchmarks.peers '{"model": ..., "tokens": ..., "mode": "packed", ...}'
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.data import IGNORED_LABEL
from benchmarks.step_server import StepServer
from llamaweft.runtime import DTYPES

MANY_STEPS = 100_000
"""More than are ever asked for."""


@dataclass(frozen=True)
class Settings:
    """model: a Hugging Face folder. tokens: rows of input_ids and labels. batch: rows (packed:
    packs) computed at once. accumulation: batches in a step. nf4: else the base is held in fp32.
    checkpointing: each layer keeps its input only; `defaults` does so too.
    """

    model: str
    tokens: str
    mode: str
    pack_tokens: int
    batch: int
    accumulation: int
    nf4: bool
    checkpointing: bool = False
    compute_dtype: str = "fp32"
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.compute_dtype]


class CountingTrainer(SFTTrainer):
    """Counts what the step was fed: padding is not work."""

    counts: Counter[str]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
        self.counts["real_tokens"] += ids.numel() if mask is None else int(mask.sum())
        self.counts["computed_tokens"] += ids.numel()
        self.counts["trained_tokens"] += int((labels[:, 1:] != IGNORED_LABEL).sum())
        loss = super().training_step(model, inputs, *args)
        self.counts["loss"] += loss.item()  # each batch's share of the step's mean
        return loss


class Turnstile(TrainerCallback):
    """Lets one step through for each `go`."""

    def __init__(self, server: StepServer) -> None:
        self.server = server
        self.trainer: CountingTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        assert self.trainer is not None
        figures, self.trainer.counts = self.trainer.counts, Counter()
        control.should_training_stop = not self.server.step_ended(**figures)
        return control


def build_trainer(settings: Settings, output: str, turnstile: Turnstile) -> CountingTrainer:
    """The trainer, as a user of trl writes it."""
    with open(settings.tokens, encoding="utf-8") as file:
        rows = Dataset.from_list([json.loads(line) for line in file])
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.mode == "defaults",
        bnb_4bit_compute_dtype=settings.dtype,
    )
    trainer = CountingTrainer(
        model=settings.model,
        args=_config(settings, output),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        quantization_config=quantisation if settings.nf4 else None,
        callbacks=[turnstile],
    )
    trainer.counts = Counter()
    turnstile.trainer = trainer
    assert trainer.model is not None
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # trl makes them bf16 beside NF4
            parameter.data = parameter.data.float()
    return trainer


def _config(settings: Settings, output: str) -> SFTConfig:
    return SFTConfig(
        output_dir=output,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        max_length=settings.pack_tokens,
        packing=settings.mode == "packed",
        packing_strategy="bfd",
        train_sampling_strategy="group_by_length" if settings.mode == "grouped" else "random",
        gradient_checkpointing=settings.checkpointing or settings.mode == "defaults",
        learning_rate=2e-4,
        max_steps=MANY_STEPS,
        bf16=False,
        use_cpu=True,
        shuffle_dataset=True,
        seed=settings.seed,
        logging_steps=MANY_STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs={
            "dtype": str(settings.dtype).removeprefix("torch."),
            "attn_implementation": "sdpa",
        },
    )


def main() -> None:
    server = StepServer()
    settings = Settings(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory() as output:
        build_trainer(settings, output, Turnstile(server)).train()


if __name__ == "__main__":
    main()
