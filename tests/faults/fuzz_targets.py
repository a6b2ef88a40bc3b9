"""What fuzz_files.py damages: for each kind of file a small valid one, how it is damaged, and what
opens it."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from fuzz_readers import Source, damaged, valid_files
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "model"))
from test_gguf import tiny, write

from llamaweft.adapters.folder import load_adapter_state, read_adapter, save_adapter
from llamaweft.adapters.lora import LoraConfig, inject
from llamaweft.data.rows import BadRows
from llamaweft.data.sources import read_rows
from llamaweft.model.convert import convert
from llamaweft.model.folder import checked_tensors, read_config
from llamaweft.model.gguf import convert_gguf
from llamaweft.model.llama import empty_causal_lm
from llamaweft.model.load import load_causal_lm
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.parallel.ranks import ALONE
from llamaweft.recipe import Recipe, describe
from llamaweft.train.checkpoint import (
    CHECKSUMS,
    LoopState,
    Snapshot,
    complete_checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_damaged_aside,
)
from llamaweft.train.misfit import check_fits
from llamaweft.train.optim import build_optimizer, optimizer_state

ABSURD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**40,
        2**63,
        -(2**70),
        0.5,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "\0",
        "é😀",
        "\ud800",
        "../../x",
        "/etc/passwd",
        "x" * 5000,
        "nan",
        "1e999",
        "[]",
        "F99",
    ),
    *(
        [],
        [[]],
        {},
        {"": None},
        [1, -1],
        ["a", None],
        {"a": {"b": [1]}},
        [2**40, 2**40],
        [0, 2**60],
    ),
]


class Target:
    """A kind of file. one_line: whether its refusals are one line each."""

    name: str
    one_line = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder / self.name
        self.valid, self.tried = self.folder / "valid", self.folder / "tried"
        self.valid.mkdir(parents=True)
        self.write_valid(self.valid)

    def write_valid(self, folder: Path) -> None:
        raise NotImplementedError

    def open(self, folder: Path) -> None:
        """Raises UserError for what is not right."""
        raise NotImplementedError

    def check_valid(self) -> None:
        shutil.copytree(self.valid, self.tried)
        self.open(self.tried)

    def attempt(self, draw: random.Random) -> None:
        shutil.rmtree(self.tried, ignore_errors=True)
        shutil.copytree(self.valid, self.tried)
        self.damage(self.tried, draw)
        self.open(self.tried)

    def damage(self, folder: Path, draw: random.Random) -> None:
        path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        if draw.random() < 0.05:
            path.unlink()
            return
        path.write_bytes(changed(path.name, path.read_bytes(), draw))


def changed(name: str, content: bytes, draw: random.Random) -> bytes:
    """A file with a few bytes changed, or, where its structure is known, another value in it."""
    if draw.random() < 0.5:
        if name.endswith(".json"):
            return changed_json(content, draw)
        if name.endswith(".safetensors"):
            return changed_safetensors(content, draw)
    return damaged(content, draw)


def changed_json(content: bytes, draw: random.Random) -> bytes:
    tree = json.loads(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        tree = with_absurd(tree, draw)
    return json.dumps(tree).encode(errors="surrogatepass")


def with_absurd(tree: Any, draw: random.Random) -> Any:
    """The tree with a value somewhere in it replaced, left out, or put beside."""
    inner = isinstance(tree, dict | list) and len(tree) > 0
    if not inner or draw.random() < 0.1:
        return copy.deepcopy(draw.choice(ABSURD))
    key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    match draw.randrange(6):
        case 0:
            del tree[key]
        case 1 if isinstance(tree, dict):
            tree[draw.choice(["", "x", "../x", str(key) + "x", "model.norm.weight"])] = tree[key]
        case _:
            tree[key] = with_absurd(tree[key], draw)
    return tree


def changed_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Another header before the same numbers."""
    length = struct.unpack("<Q", content[:8])[0]
    header = changed_json(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


# --- the kinds ----------------------------------------------------------------------------------


class Recipes(Target):
    """A recipe that is taken must come back from its dump."""

    name, one_line = "recipe", False  # a line for each mistake
    EXTRA = (
        *(
            b"!!python/object/apply:os.system [x]",
            b"&a [*a]",
            b"*b",
            b"<<: *a\n",
            b"? ",
            b"- ",
            b"{",
            b"}",
        ),
        *(
            b"%YAML 1.1\n---\n",
            b"\n---\n",
            b"...\n",
            b"2001-01-01",
            b"0x1F",
            b"0o7",
            b".nan",
            b"|\n",
            b">\n",
        ),
        *(b"'", b"~", b"#", b"@", b"`", b"\t", b"\xe2\x80\xa8", b"!", b": ", b"1_000", b"=", b"y"),
    )

    def write_valid(self, folder: Path) -> None:
        recipes = Path(__file__).parents[2] / "recipes"
        for path in sorted(recipes.glob("*.yaml")):
            (folder / path.name).write_bytes(path.read_bytes())
        minimal = Recipe.validate_tree({"model": "a/b", "data": {"train": "c.jsonl"}})
        (folder / "whole.yaml").write_text(minimal.dump())

    def check_valid(self) -> None:
        for path in self.valid.glob("*.yaml"):
            Recipe.load(path)

    def attempt(self, draw: random.Random) -> None:
        path = draw.choice(sorted(self.valid.glob("*.yaml")))
        content = path.read_bytes()
        for _ in range(draw.choice((1, 1, 2, 3))):
            content = self._changed(content, draw)
        self.tried.mkdir(exist_ok=True)
        (self.tried / path.name).write_bytes(content)
        overrides = [self._override(draw) for _ in range(draw.choice((0, 0, 0, 1, 2)))]
        recipe = Recipe.load(self.tried / path.name, overrides)
        again = Recipe.load_text(recipe.dump())
        if again != recipe and "nan" not in str(recipe):  # which is not equal to itself
            raise AssertionError(f"a dump is another recipe: {recipe!r} and {again!r}")

    def _changed(self, content: bytes, draw: random.Random) -> bytes:
        way = draw.randrange(4)
        if way == 0:
            return damaged(content, draw)
        lines = content.splitlines(keepends=True) or [b""]
        at = draw.randrange(len(lines))
        if way == 1:  # another value, as JSON has it
            key, _, _ = lines[at].partition(b":")
            value = json.dumps(draw.choice(ABSURD)).encode(errors="surrogatepass")
            lines[at] = key + b": " + value + b"\n"
        elif way == 2:
            place = draw.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + draw.choice(self.EXTRA) + lines[at][place:]
        else:
            lines[at] = draw.choice((b"", lines[at] * 2, b"  " + lines[at], lines[at].lstrip()))
        return b"".join(lines)

    def _override(self, draw: random.Random) -> str:
        key = draw.choice(list(describe()))
        value = draw.choice(ABSURD)
        text = value if isinstance(value, str) else json.dumps(value)
        return draw.choice((f"{key}={text}", f"{key}.x={text}", f"{key}.0={text}", key, f"={text}"))


class Checkpoints(Target):
    """What a resumed run does with a checkpoint, with a model of two tensors."""

    name = "checkpoint"

    def write_valid(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        self.parameters = dict(model.named_parameters())
        optimizer = self._optimizer()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        self.state = LoopState(7, 0.5, 3, {"loss": {"value": 0.5}}, packs_done=1)
        gradients = {name: torch.ones_like(p) for name, p in self.parameters.items()}
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        moments = optimizer_state(optimizer, self.parameters)
        snapshot = Snapshot(self.state, trained, moments, gradients, random_state())
        save_checkpoint(folder, snapshot, keep=1)

    def _optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(
            "adamw", self.parameters, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8
        )

    def damage(self, folder: Path, draw: random.Random) -> None:
        super().damage(folder, draw)
        if draw.random() < 0.7:  # as if somebody had written it so
            (checkpoint,) = complete_checkpoints(folder)
            sums = {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(checkpoint.iterdir())
                if path.name != CHECKSUMS
            }
            (checkpoint / CHECKSUMS).write_text(json.dumps(sums))

    def open(self, folder: Path) -> None:
        set_damaged_aside(folder)
        (checkpoint,) = complete_checkpoints(folder)
        snapshot = load_checkpoint(checkpoint)
        check_fits(
            snapshot, checkpoint, kept=self.parameters, trained=self.parameters, total_steps=10
        )
        optimizer = self._optimizer()
        snapshot.restore({}, optimizer, self.parameters, ALONE)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(snapshot.trained[name])
                parameter.grad = snapshot.gradients.get(name, torch.zeros_like(parameter))
        optimizer.step()
        json.dumps(vars(snapshot.state) | {"guard": vars(snapshot.state.guard)})
        assert isinstance(snapshot.state.name, str)


class Gguf(Target):
    name = "gguf"

    def write_valid(self, folder: Path) -> None:
        write(folder / "model.gguf", tiny())

    def open(self, folder: Path) -> None:
        convert_gguf(folder / "model.gguf", folder / "out")


class HuggingFace(Target):
    """Config, weights and tokenizer of a model folder."""

    name = "model folder"

    def write_valid(self, folder: Path) -> None:
        write(folder / "model.gguf", tiny())
        convert_gguf(folder / "model.gguf", folder / "out")
        for path in (folder / "out").iterdir():
            path.rename(folder / path.name)
        (folder / "out").rmdir()
        (folder / "model.gguf").unlink()
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for part, held in parts.items():
            save_file({name: tensors[name] for name in held}, folder / part)
        weight_map = {name: part for part, held in parts.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def open(self, folder: Path) -> None:
        config = read_config(folder)
        for tensor in checked_tensors(folder, empty_causal_lm(config), config):
            tensor.read()
        load_tokenizer(folder)("a text")


class Meta(HuggingFace):
    """Meta's layout, with another form of the tokenizer."""

    name = "meta folder"

    def write_valid(self, folder: Path) -> None:
        other = self.folder / "tokenizer"
        other.mkdir()
        super().write_valid(other)
        hidden, inner, vocabulary = 64, 96, read_config(other).vocab_size
        shapes = {
            "tok_embeddings": (vocabulary, hidden),
            "norm": (hidden,),
            "output": (vocabulary, hidden),
        }
        for layer in range(2):
            shapes |= {
                f"layers.{layer}.{name}": shape
                for name, shape in {
                    "attention.wq": (hidden, hidden),
                    "attention.wk": (hidden // 2, hidden),
                    "attention.wv": (hidden // 2, hidden),
                    "attention.wo": (hidden, hidden),
                    "feed_forward.w1": (inner, hidden),
                    "feed_forward.w2": (hidden, inner),
                    "feed_forward.w3": (inner, hidden),
                    "attention_norm": (hidden,),
                    "ffn_norm": (hidden,),
                }.items()
            }
        torch.manual_seed(0)
        self.weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        torch.save(self.weights, folder / "consolidated.00.pth")
        params = {"dim": hidden, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1}
        # 8/3 of 64, times 0.5, rounded up to a multiple of 96
        params |= {"multiple_of": inner, "ffn_dim_multiplier": 0.5, "norm_eps": 1e-5}
        params |= {"rope_theta": 500000.0}
        (folder / "params.json").write_text(json.dumps(params))

    def damage(self, folder: Path, draw: random.Random) -> None:
        if draw.random() < 0.3:  # a sound archive with something else in it
            weights: Any = dict(self.weights)
            key = draw.choice(sorted(weights))
            weights[key] = draw.choice([*ABSURD, torch.ones(3), torch.ones(2, 2, dtype=torch.int8)])
            torch.save(
                draw.choice([weights, weights, list(weights)]), folder / "consolidated.00.pth"
            )
            return
        super().damage(folder, draw)

    def open(self, folder: Path) -> None:
        convert(folder, folder / "out", str(self.folder / "tokenizer"))


class Adapters(Target):
    name = "adapter"

    def write_valid(self, folder: Path) -> None:
        base = self.folder / "base"
        write(self.folder / "base.gguf", tiny())
        convert_gguf(self.folder / "base.gguf", base)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=("q_proj", "down_proj"))
        self.model = load_causal_lm(base, base_weights="fp32")
        inject(self.model, config)
        save_adapter(self.model, config, str(base), folder)

    def open(self, folder: Path) -> None:
        _, base, state = read_adapter(folder)
        assert isinstance(base, str)
        load_adapter_state(self.model, state, str(folder))


class Rows(Target):
    name = "rows"

    def write_valid(self, folder: Path) -> None:
        for ending, content in valid_files().items():
            (folder / f"valid{ending}").write_bytes(content)

    def check_valid(self) -> None:
        for path in self.valid.iterdir():
            list(read_rows(Source(str(path))))

    def attempt(self, draw: random.Random) -> None:
        path = draw.choice(sorted(self.valid.iterdir()))
        self.tried.mkdir(exist_ok=True)
        (self.tried / path.name).write_bytes(damaged(path.read_bytes(), draw))
        bad = BadRows(draw.choice(("error", "skip")))
        for _ in read_rows(Source(str(self.tried / path.name)), bad):
            pass


TARGETS: list[type[Target]] = [Recipes, Checkpoints, Gguf, HuggingFace, Meta, Adapters, Rows]
