"""A tokenizer as a GGUF file describes it: tokens, their kinds, the merges, the way text is cut.

Keys and meanings: llama.cpp's GGUF specification, convert_hf_to_gguf.py and llama-vocab.cpp; how
they are read back: model/gguf_tokenizer.py. Only byte-level BPE is written, which Llama 3 and the
embedded model have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models

from llamaweft.errors import UserError
from llamaweft.model.gguf_tokenizer import LLAMA3, PLAIN, SINGLE_DIGITS, pre_tokenizer

CUTS = (LLAMA3[0], SINGLE_DIGITS[0], PLAIN[0])
"""Ways of cutting text that are known, by llama.cpp's names."""

SAMPLE = "a"


@dataclass(frozen=True)
class GgufTokenizer:
    """cut: how text is cut, by llama.cpp's name. tokens, types: by id, all of the model's rows.
    ids: of what has a role (`bos`, `eos`, `eot`, `eom`, `padding`, `unknown`). adds_begin,
    adds_end: whether a text gets the begin and the end token. templates: of chats."""

    cut: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]
    adds_begin: bool
    adds_end: bool
    templates: str | list[dict[str, str]] | None

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for role, token in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
        writer.add_add_bos_token(self.adds_begin)
        writer.add_add_eos_token(self.adds_end)
        if self.templates is not None:
            writer.add_chat_template(self.templates)


def gguf_tokenizer(
    tokenizer: Any, vocab_size: int, stop_ids: Iterable[int], chat: str | None
) -> GgufTokenizer:
    """What a GGUF file says of a fast tokenizer. vocab_size: rows of the model. stop_ids: tokens
    that end an answer. chat: any chat as the chat template writes it; None without a template.

    A chat whose template writes no begin token gets none by llama.cpp either, so the file then asks
    for none. Raises UserError for a tokenizer of another kind or with another way of cutting text.
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    model = tree["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} is no byte-level BPE ({model['type']}, as "
            "SentencePiece makes them), and no other is written into a GGUF; export --to hf and "
            "convert the folder with llama.cpp's own script"
        )
    cut = _cut(tree, tokenizer.name_or_path)
    tokens, types = _tokens(tokenizer, vocab_size)
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    bare = tokenizer.encode(SAMPLE, add_special_tokens=False)
    whole = tokenizer.encode(SAMPLE)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = begin is not None and whole[:1] == [begin] != bare[:1]
    ends = end is not None and whole[-1:] == [end] != bare[-1:]
    return GgufTokenizer(
        cut=cut,
        tokens=tokens,
        types=types,
        merges=merges,
        ids=_roles(tokenizer, stop_ids),
        adds_begin=begins and (chat is None or chat.startswith(tokenizer.bos_token)),
        adds_end=ends,
        templates=_templates(tokenizer.chat_template),
    )


def _cut(tree: dict[str, Any], name: str) -> str:
    """llama.cpp's name of the way text is cut."""
    for cut in CUTS:
        known = Tokenizer(models.BPE())
        known.pre_tokenizer = pre_tokenizer(cut, Path(name))
        alike = _bare(json.loads(known.to_str())["pre_tokenizer"]) == _bare(tree["pre_tokenizer"])
        if alike and tree["normalizer"] is None:
            if bool(tree["model"].get("ignore_merges")) != (cut in LLAMA3):
                break  # llama.cpp takes whole words that are tokens in Llama 3 alone
            return cut
    raise UserError(
        f"the tokenizer {name} cuts text in a way that is not known here "
        f"({', '.join(CUTS)} are); export --to hf and convert the folder with llama.cpp's own "
        "script"
    )


def _bare(part: Any) -> Any:
    """Without what changes no id."""
    if isinstance(part, dict):
        return {key: _bare(value) for key, value in part.items() if key != "trim_offsets"}
    return [_bare(one) for one in part] if isinstance(part, list) else part


def _tokens(tokenizer: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and kinds by id. Rows of the model without a token are unused ones."""
    names = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for token_id in range(vocab_size):
        kind = TokenType.NORMAL if token_id in names else TokenType.UNUSED
        if token_id in added:
            kind = TokenType.CONTROL if added[token_id].special else TokenType.USER_DEFINED
        tokens.append(names.get(token_id, f"[PAD{token_id}]"))
        types.append(int(kind))
    return tokens, types


def _roles(tokenizer: Any, stop_ids: Iterable[int]) -> dict[str, int]:
    """The ids that llama.cpp asks for by their roles. Beside the tokenizer's own end of text there
    may be an end of turn, and an end of message that waits for a tool (Llama 3.1)."""
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    others = [token for token in sorted(stop_ids) if token != tokenizer.eos_token_id]
    found |= dict(zip(("eot", "eom"), reversed(others), strict=False))
    if found["eos"] is None and "eot" in found:
        found["eos"] = found["eot"]
    return {role: int(token) for role, token in found.items() if token is not None}


def _templates(templates: Any) -> str | list[dict[str, str]] | None:
    if isinstance(templates, dict):
        return [{"name": name, "template": text} for name, text in templates.items()]
    return templates or None
