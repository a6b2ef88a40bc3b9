"""What a head with few outputs is: its task, its classes, and what transformers calls it."""

from __future__ import annotations

from dataclasses import dataclass

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
