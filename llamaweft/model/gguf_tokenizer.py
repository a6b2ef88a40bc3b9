"""The tokenizer inside a GGUF file, saved as Hugging Face's and proven to have survived.

Byte-level BPE is built here, as llama.cpp's llama-vocab.cpp reads it. (transformers' own reader
adds a token to Llama 3's vocabulary, forgets its begin of text and whole words, and does not cut
SmolLM's digits before its white space.) SentencePiece is left to transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llamaweft.errors import UserError

# How text is cut before the merges, by `tokenizer.ggml.pre`. Llama 3's: Meta's llama-models,
# llama3/tokenizer.py.
PLAIN = ("gpt-2",)
SINGLE_DIGITS = ("smollm",)
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
LLAMA3_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)
MAX_ADDED = 4096
"""Tokens found in a text before it is cut; each makes finding slower. Llama 3 has 256."""
SAMPLE = "  Hello,\tworld!  x = 1234567;\n\n\n    don't  12 héllo 你好 🙂\r\nend "


def save_gguf_tokenizer(reader: GGUFReader, path: Path, folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`.

    Raises UserError when the kind of tokenizer or its way of cutting text is not built, and when
    the tokenizer as AutoTokenizer reads it back differs from the file: its chat template, its
    begin, end and padding token, a control token that is not one id, or a text with other ids.
    """
    kind = _contents(reader, "model")
    if sum(token in ADDED for token in _contents(reader, "token_type") or ()) > MAX_ADDED:
        raise UserError(
            f"{path}: more than {MAX_ADDED} tokens are control tokens or words of their own: "
            "give the model's Hugging Face folder."
        )
    tokenizer: Any
    if kind == "gpt2":
        tokenizer = _byte_level(reader, path)
    elif kind == "llama":
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path}: the tokenizer inside cannot be read ({error}): "
                "give the model's Hugging Face folder."
            ) from None
    else:
        raise UserError(
            f"{path}: the tokenizer is of the kind {kind!r}, which is not built (gpt2 and llama "
            "are): give the model's Hugging Face folder."
        )
    length = reader.get_field("llama.context_length")
    if length is not None:
        tokenizer.model_max_length = length.contents()
    tokenizer.save_pretrained(folder)
    _name_class(folder / "tokenizer_config.json")
    _verify(tokenizer, reader, path, folder, vocab_size)


def _contents(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(f"tokenizer.ggml.{key}")
    return default if field is None else field.contents()


def _byte_level(reader: GGUFReader, path: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE from the tokens, their types and the merges."""
    tokens, types, merges = (_contents(reader, key) for key in ("tokens", "token_type", "merges"))
    if not (tokens and types and merges):
        raise UserError(
            f"{path}: tokens, token types or merges are missing: "
            "give a file that holds a whole tokenizer."
        )
    cut = _contents(reader, "pre", "gpt-2")
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
            ignore_merges=cut in LLAMA3,
        )
    )
    backend.pre_tokenizer = pre_tokenizer(cut, path)
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in ADDED:
            added = AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)
            backend.add_special_tokens([added]) if added.special else backend.add_tokens([added])
    ids = {name: _contents(reader, f"{name}_token_id") for name in ("bos", "eos", "unknown")}
    ids["pad"] = _contents(reader, "padding_token_id")
    names = {key: None if index is None else tokens[index] for key, index in ids.items()}
    if _contents(reader, "add_bos_token", cut in LLAMA3) and names["bos"] is not None:
        add_begin(backend, names["bos"])
    template = reader.get_field("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=names["bos"],
        eos_token=names["eos"],
        unk_token=names["unknown"],
        pad_token=names["pad"],
        clean_up_tokenization_spaces=False,
        chat_template=None if template is None else template.contents(),
    )


def pre_tokenizer(cut: str, path: Path) -> Any:
    """How text is cut before the merges, by llama.cpp's name. Raises UserError for another."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut not in LLAMA3)
    if cut in PLAIN:
        return byte_level
    if cut in SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    if cut in LLAMA3:
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
        return pre_tokenizers.Sequence([split, byte_level])
    raise UserError(
        f"{path}: the tokenizer cuts text as {cut!r}, which is not built "
        f"({', '.join(PLAIN + SINGLE_DIGITS + LLAMA3)} are): give the model's Hugging Face folder."
    )


def add_begin(backend: Tokenizer, begin: str) -> None:
    """The begin token before every text that is not a chat."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, backend.token_to_id(begin))],
    )


def _name_class(path: Path) -> None:
    """The class under a name that transformers 4 and 5 both know."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for machine_bound in ("is_local", "local_files_only", "name_or_path"):
        config.pop(machine_bound, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _verify(tokenizer: Any, reader: GGUFReader, path: Path, folder: Path, vocab_size: int) -> None:
    saved = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    template = reader.get_field("tokenizer.chat_template")
    checks = {
        "chat template": (saved.chat_template, template.contents() if template else None),
        "begin token": (saved.bos_token_id, _contents(reader, "bos_token_id")),
        "end token": (saved.eos_token_id, _contents(reader, "eos_token_id")),
        "padding token": (saved.pad_token_id, _contents(reader, "padding_token_id")),
        "ids of a text": (saved(SAMPLE)["input_ids"], tokenizer(SAMPLE)["input_ids"]),
        "number of tokens": (len(saved), len(_contents(reader, "tokens"))),
    }
    tokens, types = _contents(reader, "tokens"), _contents(reader, "token_type", [])
    for index, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind == TokenType.CONTROL:
            ids = saved(token, add_special_tokens=False)["input_ids"]
            checks[f"control token {token}"] = (ids, [index])
    for what, (got, expected) in checks.items():
        if got != expected:
            raise UserError(
                f"{path}: the tokenizer inside did not survive, its {what} is {got!r} and not "
                f"{expected!r}: give the model's Hugging Face folder."
            )
    if len(saved) > vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {len(saved)} tokens and the model {vocab_size}: "
            "give a file whose model and tokenizer belong together."
        )
