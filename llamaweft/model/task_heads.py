"""Output heads with few outputs, named as in transformers, so that an export opens there.

Each is trained in fp32, whatever the model computes in. It reads the hidden states at the pack's
labels (data/targets.py): N of them, each with a target and a weight.

N: labels   D: documents   T: tokens   C: classes   E: hidden size
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llamaweft.model.head_config import HeadConfig
from llamaweft.model.objectives import (
    question_answering,
    regression,
    reward,
    sequence_classification,
    token_classification,
)
from llamaweft.model.pack import Pack

Objective = Callable[[Tensor, Pack, HeadConfig, bool], Tensor]
"""Logits, the pack, the head's config and whether it is trained -> loss_N of each label."""

OBJECTIVES: dict[str, Objective] = {
    "sequence_classification": sequence_classification.label_losses,
    "regression": regression.label_losses,
    "reward": reward.label_losses,
    "token_classification": token_classification.label_losses,
    "question_answering": question_answering.label_losses,
}

INITIALISER_RANGE = 0.02
"""Standard deviation of a new head's weights, as Llama's config has it."""


class TaskHead(nn.Linear):
    """A linear layer on hidden states, and the loss of its task. Raises nothing; targets are those
    of the pack."""

    def __init__(self, config: HeadConfig, hidden_size: int, device: torch.device) -> None:
        has_bias = config.architecture != "LlamaForSequenceClassification"
        super().__init__(hidden_size, config.outputs, bias=has_bias, device=device)
        self.config = config
        nn.init.normal_(self.weight, std=INITIALISER_RANGE)
        if has_bias:
            nn.init.zeros_(self.bias)

    @property
    def reads_all(self) -> bool:
        """Whether it reads every token of a document, not its labels only."""
        return self.config.task == "question_answering"

    def forward(self, hidden_NE: Tensor) -> Tensor:
        """logits_NC, in fp32."""
        return super().forward(hidden_NE.float())

    def label_losses(self, logits: Tensor, pack: Pack) -> Tensor:
        """loss_N of each label, as the task's objective has it (model/objectives/).

        logits: logits_NC at the labels; logits_TC of all tokens where the head reads them all.
        """
        return OBJECTIVES[self.config.task](logits, pack, self.config, self.training)
