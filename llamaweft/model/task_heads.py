"""Output heads with few outputs, named as in transformers, so that an export opens there.

Each is trained in fp32, whatever the model computes in. It reads the hidden states at the pack's
labels (data/targets.py): N of them, each with a target and a weight.

N: labels   D: documents   T: tokens   C: classes   E: hidden size
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamaweft.model.pack import Pack

INITIALISER_RANGE = 0.02
"""Standard deviation of a new head's weights, as Llama's config has it."""

HEAD_NAMES = ("score", "qa_outputs")
"""Names of heads in a state dict of transformers: of classes and numbers, and of answers."""


@dataclass(frozen=True)
class HeadConfig:
    """task: of the recipe. labels: the names of the classes, in order; one of none for a number.
    many: whether several classes may hold. label_smoothing: share of a target's probability that
    is spread over all classes. center_rewards_coefficient: of a pair's squared sum of rewards."""

    task: str
    labels: tuple[str, ...]
    many: bool = False
    label_smoothing: float = 0.0
    center_rewards_coefficient: float = 0.0

    @property
    def outputs(self) -> int:
        outputs = {"regression": 1, "reward": 1, "question_answering": 2}
        return outputs.get(self.task, len(self.labels))

    @property
    def name(self) -> str:
        """The head's name in a state dict of transformers."""
        score, qa_outputs = HEAD_NAMES
        return qa_outputs if self.task == "question_answering" else score

    @property
    def architecture(self) -> str:
        """The class of transformers that the model is."""
        return {
            "question_answering": "LlamaForQuestionAnswering",
            "token_classification": "LlamaForTokenClassification",
        }.get(self.task, "LlamaForSequenceClassification")

    @property
    def peft_task(self) -> str:
        """peft's name of the task."""
        return {"question_answering": "QUESTION_ANS", "token_classification": "TOKEN_CLS"}.get(
            self.task, "SEQ_CLS"
        )

    def to_config(self) -> dict[str, object]:
        """What config.json says of the head."""
        kinds = {"regression": "regression", "sequence_classification": "single_label"}
        kind = "multi_label" if self.many else kinds.get(self.task)
        named = dict(enumerate(self.labels)) or {0: "LABEL_0"}
        found: dict[str, object] = {"architectures": [self.architecture]}
        if self.task == "question_answering":
            return found
        found |= {
            "num_labels": self.outputs,
            "id2label": {str(index): name for index, name in named.items()},
            "label2id": {name: index for index, name in named.items()},
        }
        if self.task == "token_classification":
            return found | {"classifier_dropout": 0.0}
        if self.task == "reward":
            return found
        suffix = "" if kind == "regression" else "_classification"
        return found | {"problem_type": f"{kind}{suffix}"}


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
        """loss_N of each label, in nats (regression: squared error; reward: that of its pair).

        logits: logits_NC at the labels; logits_TC of all tokens where the head reads them all. The
        losses are those of transformers' ForSequenceClassificationLoss, ForTokenClassification and
        ForQuestionAnsweringLoss; each document of several classes has the mean over them.
        """
        target_N = pack.label_target_N
        match self.config.task:
            case "regression":
                return (logits.squeeze(-1) - target_N).square()
            case "question_answering":
                return self._span_losses(logits, pack)
            case "reward":
                return self._pair_losses(logits.squeeze(-1), pack)
        if self.config.many:
            return self._several(logits, pack)
        return self._cross_entropy(logits, target_N.long())

    def _cross_entropy(self, logits_NC: Tensor, target_N: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits_NC, target_N, reduction="none", label_smoothing=smoothing)

    def _several(self, logits_NC: Tensor, pack: Pack) -> Tensor:
        """Binary cross-entropy of every class, its mean for each label of a document."""
        documents_N, target_N = pack.label_sequence_N, pack.label_target_N.long()
        holds_DC = logits_NC.new_zeros(int(documents_N.max()) + 1, self.config.outputs)
        holds_DC[documents_N[target_N >= 0], target_N[target_N >= 0]] = 1
        smoothing = self.config.label_smoothing if self.training else 0.0
        holds_NC = holds_DC[documents_N] * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits_NC, holds_NC, reduction="none").mean(-1)

    def _pair_losses(self, reward_N: Tensor, pack: Pack) -> Tensor:
        """-log sigmoid(chosen - rejected) (Bradley & Terry, 1952; Ouyang et al., 2022), and in
        training c (chosen + rejected)^2 (Eisenstein et al., 2023, eq. 2), as trl's RewardTrainer
        has both. A label's target is the sign of its reward in the difference."""
        documents_N, count = pack.label_sequence_N, int(pack.label_sequence_N.max()) + 1
        none_D = reward_N.new_zeros(count)
        margin_D = none_D.index_add(0, documents_N, reward_N * pack.label_target_N)
        losses_D = -F.logsigmoid(margin_D)
        if self.training and self.config.center_rewards_coefficient:
            sum_D = none_D.index_add(0, documents_N, reward_N)
            losses_D = losses_D + self.config.center_rewards_coefficient * sum_D.square()
        return losses_D[documents_N]

    def _span_losses(self, logits_TC: Tensor, pack: Pack) -> Tensor:
        """Cross-entropy over the places of a document, of where an answer begins and ends."""
        found = logits_TC.new_zeros(len(pack.label_target_N))
        starts = [0]
        for length in pack.lengths:
            starts.append(starts[-1] + length)
        for label, (place, side) in enumerate(
            zip(pack.label_position_N.tolist(), pack.label_target_N.long().tolist(), strict=True)
        ):
            segment = int(pack.segment_T[place])
            of_document = logits_TC[starts[segment] : starts[segment + 1], side]
            target = torch.tensor([place - starts[segment]], device=logits_TC.device)
            found[label] = self._cross_entropy(of_document[None], target)[0]
        return found
