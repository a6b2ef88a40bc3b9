"""The sections of a recipe: every key with its kind, default and one-line description. No torch
here."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llamaweft.shown import without_secret

ANSWERS = (
    *("exact_match", "f1", "json_valid", "field_f1"),
    *("rouge1", "rouge2", "rougeL", "bleu", "chrf"),
)
"""Metrics that compare generated answers."""

METRICS = (
    *("loss", "perplexity", *ANSWERS),
    *("accuracy", "macro_f1", "micro_f1", "mae", "pearson"),
)
"""Metrics that `evaluation.metrics` may name, besides a user's own as `package.module:function`."""


TASK_METRICS = {
    "chat": ("loss", "perplexity", *ANSWERS),
    "text": ("loss", "perplexity"),
    "sequence_classification": ("loss", "accuracy", "macro_f1", "micro_f1"),
    "regression": ("loss", "mae", "pearson"),
    "token_classification": ("loss", "accuracy", "macro_f1", "micro_f1"),
    "question_answering": ("loss", "exact_match", "f1"),
    "reward": ("loss", "accuracy"),
}
"""Those that fit each task; a user's own compares answers, which only chats have."""


def fitting_metric(name: str, task: str) -> str:
    """The name itself. Raises ValueError where the task has no such metric."""
    known = TASK_METRICS[task]
    if name in known or (task == "chat" and ":" in name):
        return name
    raise ValueError(f"{name} does not fit task: {task}, which has {', '.join(known)}")


def known_metric(name: str) -> str:
    """The name itself. Raises ValueError where it names no metric; the user's own module is not
    imported for it."""
    module, colon, function = name.partition(":")
    if name in METRICS or all(part.isidentifier() for part in (*module.split("."), function)):
        return name
    if colon:
        raise ValueError(f"{name!r} is no metric; write your own as package.module:function")
    near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise ValueError(
        f"unknown metric {name!r}{hint} known are {' '.join(METRICS)}, and your own as "
        "package.module:function"
    )


_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


def parse_bytes(value: object) -> object:
    """`8GiB`, `500MB` or a plain number of bytes -> int. Raises ValueError for another unit."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2] not in _UNITS:
        raise ValueError("write a size as 8GiB, 512MiB, 6GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


HUB_ONLY = ("config", "split", "revision")
NOT_WITH_FRACTION = ("format", "columns")
"""Keys of rows that would be ignored: refused where given, left out of a dump."""


Shape = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "squad",
    "summary",
    "dialogue",
    "text",
    "classification",
    "tagging",
    "preference",
    "rating",
]


Place = Annotated[str, AfterValidator(without_secret)]


class Rows(Section):
    """Where rows come from and how they are read."""

    path: Place | list[Place] | None = Field(
        None, description="file, folder, glob or web address of rows, or a list of them"
    )
    hub: str | None = Field(None, description="data set on a hub: owner/name")
    config: str | None = Field(None, description="configuration of the hub data set")
    split: str = Field("train", description="split of the hub data set")
    revision: str | None = Field(None, description="revision of the hub data set")
    format: Shape = Field("auto", description="shape of the rows; auto recognises it")
    columns: dict[str, str] | None = Field(
        None, description="our column name -> the name it has in the file"
    )

    @property
    def name(self) -> str:
        if self.path is None:
            return f"hub:{self.hub}"
        return self.path if isinstance(self.path, str) else ", ".join(self.path)

    @model_validator(mode="after")
    def _one_place(self) -> Rows:
        if not isinstance(self, Validation) and (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        for key in HUB_ONLY:
            if self.hub is None and key in self.model_fields_set:
                raise ValueError(f"{key} is a hub data set's and would be ignored here; remove it")
        return self


class TrainRows(Rows):
    weight: float = Field(
        1.0, gt=0, description="how often each row is seen in an epoch; 0.5 draws half of them"
    )


class Validation(Rows):
    fraction: float | None = Field(
        None, gt=0, lt=1, description="share of the training rows to hold out"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Validation:
        if sum(value is not None for value in (self.path, self.hub, self.fraction)) != 1:
            raise ValueError("give exactly one of fraction, path and hub")
        for key in NOT_WITH_FRACTION:
            if self.fraction is not None and key in self.model_fields_set:
                raise ValueError(f"{key} would be ignored beside fraction; remove one of them")
        return self


def _as_list(value: object) -> object:
    """`train: chats.jsonl` and `train: {path: ...}` mean a list of one."""
    values = value if isinstance(value, list) else [value]
    return [{"path": v} if isinstance(v, str) else v for v in values]


class Step(Section):
    """One step of cleaning; what each takes beside its name is in its class."""


class Normalize(Step):
    step: Literal["normalize"]
    form: Literal["NFC", "NFKC"] = Field("NFC", description="Unicode normal form")


class Empty(Step):
    step: Literal["empty"]
    min_characters: int = Field(1, ge=1, description="shortest text, or answer, that is kept")


class Length(Step):
    step: Literal["length"]
    min_characters: int | None = Field(None, ge=1, description="shortest row that is kept")
    max_characters: int | None = Field(None, ge=1, description="longest row that is kept")

    @model_validator(mode="after")
    def _bounded(self) -> Length:
        if self.min_characters is None and self.max_characters is None:
            raise ValueError("the step length needs min_characters or max_characters")
        return self


class Regex(Step):
    step: Literal["regex"]
    drop: str | None = Field(None, description="rows in which this is found go")
    keep: str | None = Field(None, description="rows in which this is not found go")

    @model_validator(mode="after")
    def _one_way(self) -> Regex:
        if (self.drop is None) == (self.keep is None):
            raise ValueError("the step regex needs either drop or keep")
        return self


class Language(Step):
    step: Literal["language"]
    keep: list[str] = Field(min_length=1, description="languages that are kept, as ISO 639-1")


class Duplicates(Step):
    step: Literal["duplicates"]


class NearDuplicates(Step):
    step: Literal["near_duplicates"]
    threshold: float = Field(0.8, gt=0, le=1, description="least Jaccard similarity")


class Leakage(Step):
    step: Literal["leakage"]
    against: Place = Field("validation", description="validation, or a file of rows")
    ngram: int = Field(13, ge=2, description="words in a row that count as the same text")


CleaningStep = Annotated[
    Normalize | Empty | Length | Regex | Language | Duplicates | NearDuplicates | Leakage,
    Field(discriminator="step"),
]


class NewToken(Section):
    """A token that the tokenizer lacks."""

    token: str = Field(description="as it is written")
    special: bool = Field(
        False, description="a control token: no text writes it, and no answer shows it"
    )


def _as_tokens(value: object) -> object:
    """`<tool>` means `{token: "<tool>"}`."""
    values = value if isinstance(value, list) else [value]
    return [{"token": v} if isinstance(v, str) else v for v in values]


def _distinct(tokens: list[NewToken]) -> list[NewToken]:
    """The tokens themselves. Raises ValueError for an empty one, and for one that comes twice."""
    seen: set[str] = set()
    for new in tokens:
        if not new.token.strip():
            raise ValueError(f"{new.token!r} is empty or only white space; write a name")
        if new.token in seen:
            raise ValueError(f"{new.token!r} is in the list twice; remove one of them")
        seen.add(new.token)
    return tokens


class Data(Section):
    """What is learnt from."""

    train: Annotated[list[TrainRows], BeforeValidator(_as_list)] = Field(
        min_length=1, description="rows to learn from"
    )
    validation: Validation | None = Field(
        Validation(fraction=0.05), description="held-out rows; null holds nothing out"
    )
    max_length_tokens: int = Field(2048, ge=2, description="longest document in tokens")
    on_too_long: Literal["split", "drop", "truncate"] | None = Field(
        None, description="what to do with a longer one; left out, it is an error"
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="which turns are trained: assistant, last (answer) or all"
    )
    chat_template: str | None = Field(
        None, description="llama3, llama3.1, chatml or a .jinja file; default: the tokenizer's own"
    )
    new_tokens: Annotated[
        list[NewToken], BeforeValidator(_as_tokens), AfterValidator(_distinct)
    ] = Field([], description="tokens to add to the tokenizer; their rows are trained")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="what to do with a row that cannot be read; skip counts it"
    )
    clean: list[CleaningStep] = Field([], description="steps that remove or change rows, in order")


class AuditSettings(Section):
    """The audit of the data."""

    allow: list[
        Literal[
            "role_order",
            "empty_answer",
            "no_trained_token",
            "untrained_end_of_turn",
            "begin_of_text",
            "out_of_vocabulary",
            "untrained_token",
            "validation_leak",
            "too_long",
            "rare_class",
            "same_answers",
        ]
    ] = Field([], description="checks that no longer stop the run")


class Head(Section):
    """The output layer of a task that does not predict the next token."""

    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None, description="what a label of each class counts: balanced, or by its name"
    )
    center_rewards_coefficient: float | None = Field(
        None, gt=0, description="pulls the two rewards of a pair towards a sum of 0 (task: reward)"
    )


class Adapter(Section):
    """What is trained: a low-rank adapter, the whole model, or parts of it."""

    method: Literal["lora", "dora", "none"] = Field(
        "lora", description="lora, dora (with magnitudes), or none: the weights themselves"
    )
    r: int = Field(16, ge=1, description="rank")
    lora_alpha: float = Field(32, gt=0, description="scale: lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before lora_A")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear (every layer's), or names such as [q_proj, v_proj]"
    )
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, description="learning rate of lora_B over that of lora_A (LoRA+)"
    )
    init_from: str | None = Field(
        None, description="adapter folder of the same base and shape to go on from"
    )
    init_lora_weights: str = Field(
        "default",
        pattern=r"^(default|pissa|pissa_niter_[0-9]{1,3})$",
        description="default, pissa (principal part of W), pissa_niter_N (its fast approximation)",
    )
    modules_to_save: list[str] | None = Field(
        None,
        min_length=1,
        description="modules to train whole, such as [embed_tokens, norm]: beside an adapter, or "
        "with none alone",
    )
    top_layers: int | None = Field(
        None, ge=1, description="with method none: train only so many of the last layers"
    )

    @property
    def trains_all(self) -> bool:
        """Whether every weight of the model is trained."""
        partly = self.top_layers is not None or self.modules_to_save is not None
        return self.method == "none" and not partly

    @model_validator(mode="after")
    def _top_layers_alone(self) -> Adapter:
        if self.top_layers is not None and self.method != "none":
            raise ValueError(
                f"top_layers: these layers would be trained whole, and method: {self.method} "
                "adapts every layer; set method: none, or name modules of theirs in modules_to_save"
            )
        return self

    @model_validator(mode="after")
    def _no_dropout_with_dora(self) -> Adapter:
        if self.method == "dora" and self.lora_dropout > 0:
            raise ValueError(
                "lora_dropout: with dora the base's product would have to be made twice, of the "
                "input and of what is left of it; set lora_dropout: 0 or method: lora"
            )
        return self

    @model_validator(mode="after")
    def _what_pissa_starts(self) -> Adapter:
        if self.init_lora_weights == "default":
            return self
        pissa = f"init_lora_weights: {self.init_lora_weights}"
        if self.method == "dora":
            raise ValueError(f"{pissa} starts a plain adapter; set method: lora or remove it")
        if self.lora_dropout > 0:
            raise ValueError(
                f"lora_dropout: with {pissa} it would drop the principal part of the base itself; "
                "set lora_dropout: 0 or init_lora_weights: default"
            )
        if self.init_from is not None:
            raise ValueError(
                f"init_from: that adapter has its start, so {pissa} would be ignored; remove one "
                "of them (what PiSSA trained goes on as a plain adapter of twice the rank)"
            )
        return self


class Training(Section):
    """The loop. `step` is an optimizer step."""

    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw, or adamw_8bit: its state in a quarter of the bytes"
    )
    optimizer_in_backward: bool = Field(
        False,
        description="update each weight as soon as its gradient is there, and hold no other; one "
        "pack a step, no clipping",
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    num_train_epochs: float = Field(1, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(
        None, ge=1, description="optimizer steps; when set it alone decides the length"
    )
    max_seconds: float | None = Field(
        None, gt=0, description="stop in time to be done after so many seconds, with all saved"
    )
    micro_batch_tokens: int = Field(2048, ge=8, description="tokens computed at once: a pack")
    gradient_accumulation_steps: int = Field(4, ge=1, description="packs in an optimizer step")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="shape of the learning rate after the warm-up"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of steps that warm up")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient to this norm")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="dtype of the matrix products; auto takes what the device is fast in"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda")
    memory_budget: Bytes | None = Field(
        None, description="peak anonymous memory of the process, e.g. 8GiB; default: what is free"
    )
    checkpoint_every_steps: int = Field(100, ge=1, description="steps between checkpoints")
    save_total_limit: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_activations: Literal["compute", "bf16"] = Field(
        "compute",
        description="dtype of what is kept for the backward pass; bf16 changes the numbers",
    )
    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        [], description="trackers to write to besides metrics.jsonl"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of a target's probability that goes to all classes"
    )
    neftune_noise_alpha: float | None = Field(
        None, gt=0, description="noise on embeddings in training (NEFTune); shares no beginnings"
    )
    seed: int = Field(0, ge=0, description="seed of everything random")

    @model_validator(mode="after")
    def _one_gradient_at_a_time(self) -> Training:
        if not self.optimizer_in_backward:
            return self
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                "optimizer_in_backward: each gradient is used and freed at once, so those of "
                f"several packs cannot be added (gradient_accumulation_steps: "
                f"{self.gradient_accumulation_steps}); set gradient_accumulation_steps: 1"
            )
        if self.max_grad_norm is not None:
            raise ValueError(
                "optimizer_in_backward: the norm of the whole gradient is known only when every "
                f"weight is updated (max_grad_norm: {self.max_grad_norm}); set max_grad_norm: null"
            )
        if self.compute_dtype == "fp16":
            raise ValueError(
                "optimizer_in_backward: fp16 skips a step when any of its gradients overflowed, "
                "and some weights would be updated by then; set compute_dtype: fp32 (or bf16)"
            )
        return self


class Evaluation(Section):
    """Measuring on held-out rows."""

    every_steps: int | None = Field(
        50, ge=1, description="steps between validations; null: only before and after"
    )
    metrics: list[Annotated[str, AfterValidator(known_metric)]] = Field(
        ["loss"],
        min_length=1,
        description=f"of {' '.join(METRICS)}, or your own as package.module:function; the first "
        "picks the best",
    )
    early_stopping_patience: int | None = Field(
        3, ge=1, description="stop after this many validations without gain; null: never"
    )
    early_stopping_min_gain: float = Field(
        0.0, ge=0, description="least gain of the first metric that counts; the best is kept anyway"
    )
    max_rows: int = Field(200, ge=1, description="held-out rows used for answers, at most")
    max_new_tokens: int = Field(256, ge=1, description="longest answer in tokens")


class Guard(Section):
    """Steps that would harm the model: found before they are taken, left out, their rows named."""

    max_skipped_steps: int = Field(3, ge=1, description="steps left out in a row before `then`")
    then: Literal["back", "stop"] = Field(
        "back", description="back: to the last good checkpoint, at a lower rate; stop: the run ends"
    )
    learning_rate_factor: float = Field(
        0.5, gt=0, lt=1, description="what the learning rate is multiplied by on going back"
    )
    max_returns: int = Field(3, ge=1, description="times it goes back before the run ends")
    loss_spike: float | None = Field(
        None,
        gt=0,
        description="standard deviations above its running mean at which a loss is left out too",
    )

    @property
    def ignored(self) -> list[str]:
        """Keys that say nothing beside the others."""
        return ["learning_rate_factor", "max_returns"] if self.then == "stop" else []

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Guard:
        for key in self.ignored:
            if key in self.model_fields_set:
                raise ValueError(f"{key} would be ignored beside then: stop; remove one of them")
        return self


class Parallel(Section):
    """How the processes of a run divide its work; a key left out is 1."""

    data: int = Field(1, ge=1, description="replicas, each with packs of its own")
    shard: int = Field(
        1, ge=1, description="ranks that hold the weights in parts (FSDP2), with packs of their own"
    )
    tensor: int = Field(1, ge=1, description="ranks that each matrix is cut over, on the same pack")
    offload: bool = Field(False, description="hold sharded states in the host's memory")
    timeout_seconds: float = Field(
        600, gt=0, description="how long a rank waits for another before the run ends"
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Parallel:
        if self.offload and self.shard == 1:
            raise ValueError(
                "offload: true holds sharded states, and shard: 1 has none; remove one of them"
            )
        return self


GENERAL_PROMPTS, AREAS = 210, 5
"""Prompts that ship with the package, and areas that they are evenly spread over."""


class Forgetting(Section):
    """Measuring, and bounding, what is forgotten: general prompts, against the model as the run
    began."""

    prompts: int = Field(
        200, ge=AREAS, le=GENERAL_PROMPTS, description="general prompts, evenly over their areas"
    )
    max_kl: float | None = Field(
        None, gt=0, description="budget: KL from the model as it was, in nats per token; null: none"
    )
    when_exceeded: Literal["stop", "choose"] = Field(
        "stop", description="stop: the run ends; choose: it goes on, and keeps what is within"
    )
    answers: int = Field(10, ge=0, description="prompts that are answered before and after")
    max_new_tokens: int = Field(128, ge=1, description="longest of these answers in tokens")

    @property
    def ignored(self) -> list[str]:
        """Keys that say nothing beside the others."""
        without_budget = ["when_exceeded"] if self.max_kl is None else []
        return without_budget + (["max_new_tokens"] if self.answers == 0 else [])

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Forgetting:
        for key in self.ignored:
            if key in self.model_fields_set:
                other = "max_kl: null" if key == "when_exceeded" else "answers: 0"
                raise ValueError(f"{key} would be ignored beside {other}; remove one of them")
        if self.answers > self.prompts:
            raise ValueError(
                f"answers: {self.answers} are more than prompts: {self.prompts}; lower answers"
            )
        return self
