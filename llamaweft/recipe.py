"""The recipe: everything a run depends on, in one file, checked before anything starts.

A recipe is YAML 1.2 (JSON is YAML too). Unknown keys, values of the wrong kind and
contradictions are errors that name the key, the file and the line. No torch here.
"""

from __future__ import annotations

import difflib
import io
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedBase
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from llamaweft.errors import UserError

METRICS = ("loss", "perplexity", "exact_match", "f1", "json_valid", "field_f1")
"""Metrics that `evaluation.metrics` may name."""

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


_HUB_ONLY = ("config", "split", "revision")
_NOT_WITH_FRACTION = ("format", "columns")
"""Keys of rows that would be ignored: refused where given, left out of a dump."""


class Rows(Section):
    """Where rows come from and how they are read."""

    path: str | None = Field(None, description="file of rows: .jsonl .json .csv .tsv .parquet")
    hub: str | None = Field(None, description="data set on a hub: owner/name")
    config: str | None = Field(None, description="configuration of the hub data set")
    split: str = Field("train", description="split of the hub data set")
    revision: str | None = Field(None, description="revision of the hub data set")
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "text"] = Field(
        "auto", description="shape of the rows; auto recognises it"
    )
    columns: dict[str, str] | None = Field(
        None, description="our column name -> the name it has in the file"
    )

    @property
    def name(self) -> str:
        return self.path or f"hub:{self.hub}"

    @model_validator(mode="after")
    def _one_place(self) -> Rows:
        if not isinstance(self, Validation) and (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        for key in _HUB_ONLY:
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
        for key in _NOT_WITH_FRACTION:
            if self.fraction is not None and key in self.model_fields_set:
                raise ValueError(f"{key} would be ignored beside fraction; remove one of them")
        return self


def _as_list(value: object) -> object:
    """`train: chats.jsonl` and `train: {path: ...}` mean a list of one."""
    values = value if isinstance(value, list) else [value]
    return [{"path": v} if isinstance(v, str) else v for v in values]


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


class Adapter(Section):
    """What is trained: a low-rank adapter, or the whole model."""

    method: Literal["lora", "none"] = Field(
        "lora", description="lora, or none for full fine-tuning"
    )
    r: int = Field(16, ge=1, description="rank")
    lora_alpha: float = Field(32, gt=0, description="scale: lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before lora_A")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="all-linear (every layer's), or names such as [q_proj, v_proj]"
    )


class Training(Section):
    """The loop. `step` is an optimizer step."""

    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw, or adamw_8bit: its state in a quarter of the bytes"
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
    seed: int = Field(0, ge=0, description="seed of everything random")


class Evaluation(Section):
    """Measuring on held-out rows."""

    every_steps: int | None = Field(
        50, ge=1, description="steps between validations; null: only before and after"
    )
    metrics: list[Literal[METRICS]] = Field(  # type: ignore[valid-type]
        ["loss"], min_length=1, description=f"of {' '.join(METRICS)}; the first picks the best"
    )
    early_stopping_patience: int | None = Field(
        3, ge=1, description="stop after this many validations without gain; null: never"
    )
    max_rows: int = Field(200, ge=1, description="held-out rows used for answers, at most")
    max_new_tokens: int = Field(256, ge=1, description="longest answer in tokens")


class Recipe(Section):
    """A run, complete."""

    model: str = Field(
        description="hub id, Hugging Face folder, .gguf file or builtin:smollm2-135m"
    )
    task: Literal["chat", "text"] = Field("chat", description="what is learnt")
    data: Data = Field(description="what is learnt from")
    adapter: Adapter = Field(Adapter(), description="what is trained")
    base_weights: Literal["auto", "nf4", "int8", "bf16", "fp32"] = Field(
        "auto", description="how frozen weights are held; auto: as computed with, or nf4 if large"
    )
    training: Training = Field(Training(), description="the loop")
    evaluation: Evaluation = Field(Evaluation(), description="measuring on held-out rows")
    parallel: Literal["auto"] = Field("auto", description="auto: one process")
    output_dir: str = Field("runs/run", description="the run folder")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Recipe:
        if self.adapter.method == "none":
            given = self.adapter.model_fields_set - {"method"}
            if given:
                raise ValueError(
                    f"adapter.method is none (full fine-tuning), so adapter.{min(given)} "
                    "would be ignored; remove one of them"
                )
            if self.base_weights not in ("auto", "fp32"):
                raise ValueError(
                    f"base_weights: {self.base_weights} holds frozen weights, and adapter.method: "
                    "none trains them all in fp32; remove base_weights or train an adapter"
                )
        measuring = self.evaluation.model_fields_set
        if self.data.validation is None and measuring:
            raise ValueError(
                f"data.validation is null, so evaluation.{min(measuring)} would be ignored; "
                "remove one of them"
            )
        if self.task == "text":
            if "train_on" in self.data.model_fields_set:
                raise ValueError("task: text trains every token; remove data.train_on")
            for metric in set(self.evaluation.metrics) - {"loss", "perplexity"}:
                raise ValueError(f"evaluation.metrics: {metric} needs answers; task: text has none")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
        """Read a recipe file and apply `key.sub=value` overrides.

        Raises UserError for a missing or unreadable file, an unknown key, a wrong value.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"there is no recipe {path}; give the path of a YAML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the recipe {path} cannot be read: {error}") from None
        return cls.load_text(text, str(path), overrides)

    @classmethod
    def load_text(
        cls, text: str, where: str = "the recipe", overrides: list[str] | tuple[str, ...] = ()
    ) -> Recipe:
        """A recipe from YAML text; `where` names it in errors. Raises UserError as `load`."""
        tree = _parse_yaml(text, where)
        if not isinstance(tree, dict):
            raise UserError(f"{where} is not a mapping of keys; see README for an example")
        for override in overrides:
            _apply_override(tree, override)
        return cls.validate_tree(tree, where)

    @classmethod
    def validate_tree(cls, tree: dict[str, Any], where: str = "the recipe") -> Recipe:
        """A recipe from nested dicts. Raises UserError with every mistake, one a line."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(_explain(error, tree, where)) from None

    def flat(self) -> dict[str, str | int | float]:
        """Dotted keys and their values: what trackers show. Keys that are null are left out."""
        values = _flat(self.model_dump(mode="json"))
        return {key: value for key, value in values.items() if value is not None}

    def changed_keys(self, other: Recipe) -> list[str]:
        """Dotted keys that differ and would make a resumed run another run."""
        ours, theirs = (_flat(recipe.model_dump(mode="json")) for recipe in (self, other))
        return [
            key
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) and not key.startswith(_FREE_ON_RESUME)
        ]

    def overridden(self, changes: dict[str, str]) -> Recipe:
        """The same recipe with some keys changed, as overrides on the command line do."""
        return Recipe.load_text(self.dump(), overrides=[f"{k}={v}" for k, v in changes.items()])

    def dump(self) -> str:
        """The resolved recipe as YAML: every key, local paths made absolute."""
        tree = self.model_dump(mode="json")
        for rows in [*tree["data"]["train"], tree["data"]["validation"] or {}]:
            rows["path"] = _absolute(rows.get("path"))
            ignored: tuple[str, ...] = () if rows.get("hub") else _HUB_ONLY
            ignored += _NOT_WITH_FRACTION if rows.get("fraction") else ()
            for key in [key for key, value in rows.items() if value is None or key in ignored]:
                del rows[key]
        if self.task == "text":
            del tree["data"]["train_on"]
        tree["model"] = _absolute(tree["model"])
        if self.adapter.method == "none":
            tree["adapter"] = {"method": "none"}
        if self.data.validation is None:
            del tree["evaluation"]
        stream = io.StringIO()
        _yaml("safe").dump(tree, stream)
        return stream.getvalue()


_FREE_ON_RESUME = (
    "output_dir",
    "training.checkpoint_every_steps",
    "training.save_total_limit",
    "training.report_to",
    "training.memory_budget",
    "training.max_seconds",
)
"""Keys that a resumed run may change: the steps stay the same."""


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _yaml(kind: str) -> YAML:
    yaml = YAML(typ=kind, pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _absolute(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return _yaml("rt").load(text)
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem).split())
        raise UserError(f"{where}{line} is not valid YAML: {problem}") from None
    except (YAMLError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{where} is not valid YAML: {first}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override!r} is no override; write key.sub=value, as in training.seed=1")
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = _child(node, parent, override)
    parsed = _parse_yaml(value, f"the override {override!r}") if value else None
    if isinstance(node, list):
        node[_index(node, last, override)] = parsed
    else:
        node[last] = parsed


def _child(node: Any, key: str, override: str) -> Any:
    """The mapping or list below `key`; a missing one is made."""
    if isinstance(node, list):
        return node[_index(node, key, override)]
    if node.get(key) is None:
        node[key] = {}
    if not isinstance(node[key], dict | list):
        raise UserError(f"the override {override!r}: {key} holds one value, {node[key]!r}")
    return node[key]


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UserError(f"the override {override!r}: {key!r} is no index of a list of {len(node)}")
    return int(key)


def _explain(error: ValidationError, tree: dict[str, Any], where: str) -> str:
    """One sentence a mistake, with file, line and, for an unknown key, the nearest valid one."""
    sentences: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        keys = _keys_of(detail, tree)
        name = ".".join(str(key) for key in keys)
        line = _line_of(tree, keys)
        place = where + (f" line {line}" if line else "")
        sentences.setdefault(name, f"{place}: {_sentence(detail, name)}")
    return "\n".join(sentences.values())


def _sentence(detail: ErrorDetails, name: str) -> str:
    match detail["type"]:
        case "extra_forbidden":
            plain = re.sub(r"\.\d+\.", ".", name)
            near = difflib.get_close_matches(plain, list(describe()), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"unknown key {name!r}{hint}"
        case "missing":
            return f"the key {name!r} is missing"
        case "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            return f"{name}: {message}" if name else message
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            return f"{name}: {message} (it is {detail['input']!r})"


def _keys_of(detail: ErrorDetails, tree: Any) -> list[str | int]:
    """The part of pydantic's location that is in the file: it appends names of union members."""
    keys: list[str | int] = []
    node = tree
    for key in detail["loc"]:
        if isinstance(node, list):
            inside = isinstance(key, int) and key < len(node)
        else:
            inside = isinstance(node, dict) and key in node
        if not inside:
            if detail["type"] == "missing" and key == detail["loc"][-1]:
                keys.append(key)
            if isinstance(key, int):  # a single value that stands for a list of one
                continue
            break
        keys.append(key)
        node = node[key]
    return keys


def _line_of(tree: Any, keys: list[str | int]) -> int | None:
    line, node = None, tree
    for key in keys:
        if not isinstance(node, CommentedBase) or not isinstance(node, dict | list):
            break
        try:
            position = node.lc.item(key) if isinstance(node, list) else node.lc.key(key)
        except (KeyError, TypeError, IndexError):
            break
        line, node = position[0] + 1, node[key]  # type: ignore[index]
    return line


def describe(section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, str]:
    """Every key, dotted, with its one-line description and default: what `--help` prints."""
    table: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = next((t for t in _types_in(field.annotation) if issubclass(t, Section)), None)
        if inner is not None:
            table |= describe(inner, f"{prefix}{name}.")
            continue
        default = "" if field.is_required() else f" [{_show(field.default)}]"
        table[f"{prefix}{name}"] = f"{field.description}{default}"
    return table


def _types_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return [annotation]
    return [t for arg in getattr(annotation, "__args__", ()) for t in _types_in(arg)]


def _show(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
