"""Tokenizers by name: a hub id, a Hugging Face folder, Meta's tokenizer.model, a built-in model."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from llamaweft.errors import UserError
from llamaweft.model.builtin import builtin_folder
from llamaweft.model.gguf_tokenizer import LLAMA3_SPLIT, add_begin

# Meta's llama-models, llama3/tokenizer.py: the ranks, and the 256 ids after them.
LLAMA3_RANKS = 128_000
LLAMA3_SPECIAL = 256
LLAMA3_NAMED = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
]
CHAT_TEMPLATES = ("llama3", "llama3.1", "chatml")
"""For models that come without one."""

HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json")


def load_tokenizer(name: str | Path) -> Any:
    """The fast tokenizer (transformers') of a model.

    `name`: `builtin:NAME`, a Hugging Face folder, Meta's Llama 3 tokenizer.model or the folder
    that holds it, or a hub id. A folder is read without asking the hub, and code that comes with
    a tokenizer is never run.

    Raises UserError when it cannot be loaded.
    """
    if str(name).startswith("builtin:"):
        return _load(builtin_folder(str(name)))
    path = Path(name).expanduser()
    if path.is_file():
        return meta_tokenizer(path)
    if path.is_dir():
        meta = path / "tokenizer.model"
        if meta.is_file() and not any((path / file).exists() for file in HUGGING_FACE_FILES):
            return meta_tokenizer(meta)
        return _load(path)
    if isinstance(name, Path) or path.is_absolute() or str(name).count("/") != 1:
        raise UserError(
            f"{name}: there is no such file or folder: give a hub id, a model folder, Meta's "
            "tokenizer.model or a builtin: name."
        )
    from llamaweft.model.hub import downloaded_tokenizer

    return load_tokenizer(downloaded_tokenizer(str(name)))


def chat_template(name: str) -> str:
    """The text of a template of ours, one of CHAT_TEMPLATES."""
    return Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8").strip()


def set_chat_template(tokenizer: Any, name: str) -> None:
    """Give a tokenizer a template of ours, or that of a file.

    Raises UserError for another name, and when the tokenizer lacks a control token of it.
    """
    try:
        ours = name in CHAT_TEMPLATES
        text = chat_template(name) if ours else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"data.chat_template: {name} is no file that can be read, and none of "
            f"{', '.join(CHAT_TEMPLATES)}"
        ) from None
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = set(re.findall(r"<\|\w+\|>", text)) - special
    if missing:
        raise UserError(
            f"data.chat_template: {name} writes {min(missing)}, which is no control token of "
            f"{tokenizer.name_or_path}; take another template or model"
        )
    tokenizer.chat_template = text


def _load(name: Path) -> Any:
    if not any((name / file).exists() for file in HUGGING_FACE_FILES):
        raise UserError(f"{name}: holds no tokenizer.json: add the model's tokenizer files.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name), local_files_only=True, trust_remote_code=False, use_fast=True
        )
        tokenizer("a")  # what makes no sense in its config may show only when it is used
    except Exception as error:  # transformers raises what its many readers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: its tokenizer cannot be loaded ({reason}).") from None
    if not tokenizer.is_fast:
        raise UserError(f"{name}: its tokenizer is not a fast one: save it with tokenizer.json.")
    return tokenizer


class _Llama3Converter(TikTokenConverter):
    """Reads the file as it is now: tiktoken's own reader keeps a copy by path, which goes stale."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return _ranks(Path(tiktoken_url))


def meta_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Meta's Llama 3 tokenizer.model with Llama 3's chat template: 128,256 ids.

    Begin of text `<|begin_of_text|>` (put before a plain text), end `<|eot_id|>`, padding
    `<|finetune_right_pad_id|>`. The names of the special ids are those of Llama 3.1 and later;
    Llama 3.0 has the same ids, and calls some of them reserved. Parity: Meta's ChatFormat.

    Raises UserError when the file is another one: Llama 2's and Llama 4's have the same name.
    """
    reserved = range(2, 2 + LLAMA3_SPECIAL - len(LLAMA3_NAMED))
    special = LLAMA3_NAMED + [f"<|reserved_special_token_{index}|>" for index in reserved]
    converter = _Llama3Converter(
        vocab_file=str(path), pattern=LLAMA3_SPLIT, extra_special_tokens=special
    )
    backend = converter.converted()
    add_begin(backend, special[0])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[0],
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template("llama3")
    tokenizer.name_or_path = str(path)
    return tokenizer


def _ranks(path: Path) -> dict[bytes, int]:
    """tiktoken's format: a line for each token, its bytes in base64 and its rank."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        ranks = {}
    if len(ranks) != LLAMA3_RANKS:
        raise UserError(
            f"{path}: is not Llama 3's tokenizer.model (tiktoken format, {LLAMA3_RANKS:,} tokens): "
            "give that file, or the model's Hugging Face folder."
        )
    return ranks
