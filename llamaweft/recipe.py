"""The recipe: everything a run depends on, in one file, checked before anything starts.

A recipe is YAML 1.2 (JSON is YAML too). Unknown keys, values of the wrong kind and
contradictions are errors that name the key, the file and the line. No torch here.
"""

from __future__ import annotations

import difflib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedBase
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from llamaweft.errors import UserError
from llamaweft.settings import (
    HUB_ONLY,
    NOT_WITH_FRACTION,
    Adapter,
    AuditSettings,
    Data,
    Evaluation,
    Forgetting,
    Guard,
    Head,
    Parallel,
    Section,
    Training,
    fitting_metric,
)

OF_TURNS = ("train_on", "chat_template")
"""Keys of `data` that only chats have."""
TURNS_OF = {"chat": (), "reward": ("train_on",)}
"""Those of them that these tasks have no use for; other tasks have none for any."""
WITHOUT_ADAPTER = ("top_layers", "modules_to_save")
"""Keys of `adapter` that say what is trained where there is none."""
WITH_WORDS = ("chat", "text")
"""Tasks whose models answer in words."""
OF_CLASSES = ("sequence_classification", "token_classification")
OF_WHOLE_TEXTS = ("sequence_classification", "regression", "question_answering")
OF_LABELS = ("regression", "reward")
"""Tasks whose targets are numbers or pairs, and no classes."""

KEYS = "<keys>"
"""The kind of a value that is a mapping where a word would do too."""

MAX_BYTES = 2**20
MAX_VALUES = 100_000
MAX_SHOWN = 200
"""Characters of a wrong value that an error shows."""


class Recipe(Section):
    """A run, complete."""

    model: str = Field(
        description="hub id, Hugging Face or Meta folder, .gguf file or builtin:smollm2-135m"
    )
    model_revision: str | None = Field(
        None, description="commit, tag or branch of a hub model; the commit is recorded"
    )
    task: Literal[
        "chat",
        "text",
        "sequence_classification",
        "regression",
        "token_classification",
        "question_answering",
        "reward",
    ] = Field("chat", description="what is learnt")
    data: Data = Field(description="what is learnt from")
    audit: AuditSettings = Field(AuditSettings(), description="the audit of the data")
    head: Head = Field(Head(), description="the output layer of tasks that have their own")
    adapter: Adapter = Field(Adapter(), description="what is trained")
    base_weights: Literal["auto", "nf4", "int8", "bf16", "fp32"] = Field(
        "auto", description="how frozen weights are held; auto: as computed with, or nf4 if large"
    )
    training: Training = Field(Training(), description="the loop")
    evaluation: Evaluation = Field(Evaluation(), description="measuring on held-out rows")
    forgetting: Forgetting | None = Field(
        None, description="measuring what is forgotten; null: not measured"
    )
    guard: Guard = Field(Guard(), description="steps that would harm the model")
    parallel: Annotated[
        Annotated[Literal["auto"], Tag("auto")] | Annotated[Parallel, Tag(KEYS)],
        Discriminator(lambda value: "auto" if isinstance(value, str) else KEYS),
    ] = Field("auto", description="auto: as the plan chooses for the processes that are started")
    output_dir: str = Field("runs/run", description="the run folder")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Recipe:
        if self.adapter.method == "none":
            given = self.adapter.model_fields_set - {"method", *WITHOUT_ADAPTER}
            if given:
                raise ValueError(
                    f"adapter.method is none (full fine-tuning, or of parts), so "
                    f"adapter.{min(given)} would be ignored; remove one of them"
                )
            if self.adapter.trains_all and self.base_weights not in ("auto", "fp32"):
                raise ValueError(
                    f"base_weights: {self.base_weights} holds frozen weights, and adapter.method: "
                    "none trains them all in fp32; remove base_weights, set adapter.top_layers, or "
                    "train an adapter"
                )
        pissa = self.adapter.init_lora_weights
        if pissa != "default" and self.base_weights in ("nf4", "int8"):
            raise ValueError(
                f"base_weights: {self.base_weights} is quantised, and adapter.init_lora_weights: "
                f"{pissa} needs weights that are not; set base_weights: bf16 (or fp32)"
            )
        measuring = self.evaluation.model_fields_set
        if self.forgetting is not None:  # it is measured at the same steps
            measuring = measuring - {"every_steps"}
        if self.data.validation is None and measuring:
            raise ValueError(
                f"data.validation is null, so evaluation.{min(measuring)} would be ignored; "
                "remove one of them"
            )
        self._check_task()
        return self

    def _check_task(self) -> None:
        """Raises ValueError for what does not fit the task."""
        for key in TURNS_OF.get(self.task, OF_TURNS):
            if key in self.data.model_fields_set:
                raise ValueError(f"task: {self.task} trains no turns; remove data.{key}")
        for metric in self.evaluation.metrics:
            try:
                fitting_metric(metric, self.task)
            except ValueError as error:
                raise ValueError(f"evaluation.metrics: {error}") from None
        if self.forgetting is not None and self.task not in WITH_WORDS:
            raise ValueError(
                f"forgetting is measured on answers in words, and a model of task: {self.task} has "
                "none; remove forgetting"
            )
        if self.head.class_weights is not None and self.task not in OF_CLASSES:
            raise ValueError(f"task: {self.task} has no classes; remove head.class_weights")
        if self.training.label_smoothing and self.task in OF_LABELS:
            raise ValueError(f"task: {self.task} has no classes; remove training.label_smoothing")
        if self.data.on_too_long == "split" and self.task in OF_WHOLE_TEXTS:
            raise ValueError(
                f"data.on_too_long: split would cut a text off from its label (task: {self.task}); "
                "use drop or truncate"
            )
        if self.data.on_too_long in ("split", "truncate") and self.task == "reward":
            raise ValueError(
                f"data.on_too_long: {self.data.on_too_long} would cut off the end of a text, at "
                "which its reward is read (task: reward); use drop"
            )
        if self.head.center_rewards_coefficient is not None and self.task != "reward":
            raise ValueError(
                f"task: {self.task} has no rewards; remove head.center_rewards_coefficient"
            )

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
        """Read a recipe file and apply `key.sub=value` overrides.

        Raises UserError for a missing or unreadable file, an unknown key, a wrong value.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
            text = content.decode()
        except FileNotFoundError:
            raise UserError(f"there is no recipe {path}; give the path of a YAML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the recipe {path} cannot be read: {error}") from None
        if len(content) > MAX_BYTES:
            raise UserError(
                f"the recipe {path} has more than {MAX_BYTES // 2**20} MiB; give the recipe, not "
                "its data"
            )
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

    def changes(self, other: Recipe) -> list[Change]:
        """The keys that differ, and whether a resumed run may have the other's value."""
        ours, theirs = (_flat(recipe.model_dump(mode="json")) for recipe in (self, other))
        return [
            Change(key, ours.get(key), theirs.get(key), key.startswith(_FREE_ON_RESUME))
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]

    def overridden(self, changes: dict[str, str]) -> Recipe:
        """The same recipe with some keys changed, as overrides on the command line do."""
        return Recipe.load_text(self.dump(), overrides=[f"{k}={v}" for k, v in changes.items()])

    def dump(self) -> str:
        """The resolved recipe as YAML: every key, local paths made absolute."""
        tree = self.model_dump(mode="json")
        for rows in [*tree["data"]["train"], tree["data"]["validation"] or {}]:
            path = rows.get("path")
            rows["path"] = (
                [_absolute(p) for p in path] if isinstance(path, list) else _absolute(path)
            )
            ignored: tuple[str, ...] = () if rows.get("hub") else HUB_ONLY
            ignored += NOT_WITH_FRACTION if rows.get("fraction") else ()
            for key in [key for key, value in rows.items() if value is None or key in ignored]:
                del rows[key]
        for step in tree["data"]["clean"]:
            for key in [key for key, value in step.items() if value is None]:
                del step[key]
            if "against" in step:
                step["against"] = _absolute(step["against"])
        tree["data"]["chat_template"] = _absolute(tree["data"]["chat_template"])
        for key in TURNS_OF.get(self.task, OF_TURNS):
            del tree["data"][key]
        tree["model"] = _absolute(tree["model"])
        tree["adapter"]["init_from"] = _absolute(tree["adapter"]["init_from"])
        if self.adapter.method == "none":
            kept = {key: tree["adapter"][key] for key in WITHOUT_ADAPTER}
            given = {key: value for key, value in kept.items() if value is not None}
            tree["adapter"] = {"method": "none"} | given
        if self.data.validation is None:
            every = tree.pop("evaluation")["every_steps"]
            if self.forgetting is not None:
                tree["evaluation"] = {"every_steps": every}
        for key in self.forgetting.ignored if self.forgetting is not None else ():
            del tree["forgetting"][key]
        for key in self.guard.ignored:
            del tree["guard"][key]
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
    "guard.",
)
"""Keys that a resumed run may change: its steps stay the same, but for those that the guard leaves
out."""


@dataclass(frozen=True)
class Change:
    """A key of two recipes with its values. allowed: whether a run may go on with the new one."""

    key: str
    old: Any
    new: Any
    allowed: bool

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


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
    yaml.width = 2**31  # a text with control characters does not survive being folded
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _absolute(path: str | None) -> str | None:
    try:
        return str(Path(path).resolve()) if path and Path(path).exists() else path
    except OSError:  # a name that no file could have
        return path


def _parse_yaml(text: str, where: str) -> Any:
    try:
        if ("!" in text or "*" in text) and (problem := _no_plain_tree(text)):
            raise UserError(f"{where} {problem}")
        tree = _yaml("rt").load(text)
        if _values_within(tree, MAX_VALUES) > MAX_VALUES:
            raise UserError(
                f"{where} unfolds to more than {MAX_VALUES:,} values by its aliases; write them out"
            )
        return tree
    except UserError:
        raise
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem).split())
        raise UserError(f"{where}{line} is not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply; mend its brackets") from None
    except Exception as error:  # the parser raises whatever broken text leads it to
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} is not valid YAML: {first}") from None


def _no_plain_tree(text: str) -> str | None:
    """What in a YAML text is more than a tree of plain values: a tag, as one of Python's objects
    has, or an alias inside of what it stands for. None for nothing."""
    inside: list[str | None] = []
    for event in _yaml("rt").parse(text):
        tag, anchor = getattr(event, "tag", None), getattr(event, "anchor", None)
        if tag is not None:
            return f"has the tag {tag}; a recipe holds plain values, so remove it"
        if isinstance(event, AliasEvent) and anchor in inside:
            return f"has the alias *{anchor} inside of what it stands for; write it out"
        if isinstance(event, CollectionStartEvent):
            inside.append(anchor)
        elif isinstance(event, CollectionEndEvent):
            inside.pop()
    return None


def _values_within(tree: Any, limit: int) -> int:
    """Keys and values of a tree, as often as they stand in it; counting ends above `limit`."""
    count, waiting = 0, [tree]
    while waiting and count <= limit:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | set | tuple):
            waiting += value
    return count


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
            return f"{name}: {message} (it is {_shortened(repr(detail['input']))})"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


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
            if isinstance(key, int) or key == KEYS:  # an int: a single value for a list of one
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
        if position is None:  # of a key that an empty mapping lacks
            break
        line, node = position[0] + 1, node[key]  # type: ignore[index]
    return line


def describe(section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, str]:
    """Every key, dotted, with its one-line description and default: what `--help` prints."""
    table: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = [t for t in _types_in(field.annotation) if issubclass(t, Section)]
        if len(inner) == 1:
            table |= describe(inner[0], f"{prefix}{name}.")
            continue
        if "step" in section.model_fields and name == "step":
            continue
        for step in inner:  # one of several kinds, told apart by its key `step`
            (kind,) = get_args(step.model_fields["step"].annotation)
            table |= describe(step, f"{prefix}{name}.{kind}.")
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
