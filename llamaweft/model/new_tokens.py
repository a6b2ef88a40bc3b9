"""Tokens that a tokenizer lacks: added to it, and given rows in the embedding and the head.

A new row begins as the mean of the rows of the pieces that the tokenizer cut the token into before
(Koto et al., 2021: IndoBERTweet, where it was better than random rows and than the mean of other
models' vectors): the model then begins with what it makes of those pieces, and not with noise.

N: new tokens   E: hidden size   V: vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from llamaweft.errors import UserError
from llamaweft.model.llama import LlamaForCausalLM
from llamaweft.model.presets import LlamaConfig
from llamaweft.weights.frozen import FrozenWeight
from llamaweft.weights.grown import GrownWeight
from llamaweft.weights.linear import Embedding, Linear

KEY = "data.new_tokens"


@dataclass(frozen=True)
class NewTokens:
    """texts: as they are written. first: the id of the first; the others follow. pieces: the ids
    that each of them was read as before."""

    texts: tuple[str, ...]
    first: int
    pieces: tuple[tuple[int, ...], ...]

    @property
    def ids(self) -> range:
        return range(self.first, self.first + len(self.texts))

    def grown(self, config: LlamaConfig) -> LlamaConfig:
        """The config of a model that has rows for them. Spare rows are used first, as
        transformers' `resize_token_embeddings` leaves them to be."""
        return replace(config, vocab_size=max(config.vocab_size, self.ids.stop))


def add_new_tokens(
    tokenizer: Any, wanted: Sequence[tuple[str, bool]], vocab_size: int
) -> NewTokens:
    """Add tokens to a tokenizer, each with whether it is a control token. vocab_size: rows that the
    model has now.

    Raises UserError for a token that the tokenizer has already or cannot hold, and where rows of
    tokens that it had are missing in the model.
    """
    for text, _ in wanted:
        _check_new(tokenizer, text)
    pieces = [tuple(_ids(tokenizer, text)) for text, _ in wanted]
    for text, special in wanted:
        token = AddedToken(text, normalized=False, special=special)
        tokenizer.add_tokens([token], special_tokens=special)
    first = tokenizer.convert_tokens_to_ids(wanted[0][0])
    new = NewTokens(tuple(text for text, _ in wanted), first, tuple(pieces))
    for token_id, text in zip(new.ids, new.texts, strict=True):
        if _ids(tokenizer, text) != [token_id] or tokenizer.decode([token_id]) != text:
            raise UserError(
                f"{KEY}: {text!r} is read or written otherwise by the tokenizer "
                f"{tokenizer.name_or_path}; take another name, of ASCII characters"
            )
    if first > vocab_size:
        raise UserError(
            f"{KEY}: the tokenizer {tokenizer.name_or_path} has {first} tokens and the model rows "
            f"for {vocab_size}, so those between would have none; take the model's own tokenizer"
        )
    return new


def named(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, bool]]:
    """Added tokens of a tokenizer by their ids, as `add_new_tokens` takes them.

    Raises UserError for a token that was not added.
    """
    added = tokenizer.added_tokens_decoder
    for token_id in ids:
        if token_id not in added:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer there has no added token {token_id}, and "
                "the adapter rows for it; give the run folder that it is in"
            )
    return [(added[token_id].content, added[token_id].special) for token_id in ids]


def _check_new(tokenizer: Any, text: str) -> None:
    pieces = _ids(tokenizer, text)
    unknown = pieces == [tokenizer.unk_token_id]
    if text in tokenizer.get_vocab() or (len(pieces) == 1 and not unknown):
        raise UserError(
            f"{KEY}: the tokenizer {tokenizer.name_or_path} has {text!r} already; take it "
            "out of the list"
        )
    if not pieces:
        raise UserError(
            f"{KEY}: the tokenizer {tokenizer.name_or_path} reads nothing in {text!r}; take "
            "another name"
        )


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def grow(model: LlamaForCausalLM, new: NewTokens) -> None:
    """Give a model rows for new tokens, in its embedding and in its head. A frozen matrix is kept
    as it is, with trained rows beside it; a trained one is made anew."""
    tied = model.config.tie_word_embeddings
    model.config = model.model.config = new.grown(model.config)
    model.lm_head.out_features = model.config.vocab_size
    embedding: list[Embedding | Linear] = [model.model.embed_tokens]
    for module in embedding if tied else [*embedding, model.lm_head]:
        rows_NE = _initial_rows(module.weight, new.pieces)
        if isinstance(module.weight, FrozenWeight):
            module.hold_grown(GrownWeight(module.weight, new.first, nn.Parameter(rows_NE)))
        else:
            assert isinstance(module.weight, nn.Parameter)
            module.hold(_grown_parameter(module.weight, new.first, rows_NE))
    model.tie_weights()


def _initial_rows(weight: Any, pieces: Sequence[Sequence[int]]) -> Tensor:
    """rows_NE in fp32: for each new token the mean of the rows of its pieces."""
    ids = [torch.tensor(list(of_token), device=weight.device) for of_token in pieces]
    if isinstance(weight, FrozenWeight):
        rows = [weight.gather(of_token, torch.float32) for of_token in ids]
    else:
        rows = [weight.detach()[of_token].float() for of_token in ids]
    return torch.stack([of_token.mean(0) for of_token in rows])


def _grown_parameter(weight: nn.Parameter, first: int, rows_NE: Tensor) -> nn.Parameter:
    """A copy of w_VE with these rows from `first` on."""
    after = weight.detach()[first + len(rows_NE) :]
    return nn.Parameter(torch.cat([weight.detach()[:first], rows_NE, after]))
