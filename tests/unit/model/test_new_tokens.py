"""Which tokens are added to a tokenizer, with which ids, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llamaweft.data.chat import special_ids
from llamaweft.errors import UserError
from llamaweft.model.load import load_causal_lm, same_weights
from llamaweft.model.new_tokens import NewTokens, add_new_tokens, grow, named
from llamaweft.model.presets import PRESETS
from llamaweft.model.tokenizer import load_tokenizer
from llamaweft.weights.grown import row_parameters


@pytest.fixture
def fresh():
    """A tokenizer that a test may change."""
    return load_tokenizer("builtin:smollm2-135m")


def add(tokenizer, *texts: str, special: bool = False, vocab_size: int | None = None) -> NewTokens:
    wanted = [(text, special) for text in texts]
    return add_new_tokens(tokenizer, wanted, vocab_size or len(tokenizer))


def test_they_are_read_and_written_as_they_are_and_ids_follow(fresh) -> None:
    before = len(fresh)
    pieces = [tuple(fresh(t, add_special_tokens=False).input_ids) for t in ("<b>", "<a> x", "<a>")]
    new = add(fresh, "<b>", "<a> x", "<a>")
    assert new == NewTokens(("<b>", "<a> x", "<a>"), before, tuple(pieces))
    assert len(fresh) == before + 3
    ids = fresh("say <a>, <b> or <a> x", add_special_tokens=False).input_ids
    assert [i for i in ids if i in new.ids] == [before + 2, before, before + 1]
    assert fresh.decode(ids, skip_special_tokens=True) == "say <a>, <b> or <a> x"
    assert not special_ids(fresh) & {*new.ids}
    assert named(fresh, list(new.ids)) == [("<b>", False), ("<a> x", False), ("<a>", False)]


def test_a_control_token_is_one(fresh) -> None:
    new = add(fresh, "<|call|>", special=True)
    assert {*new.ids} <= special_ids(fresh)
    assert fresh.decode([*new.ids], skip_special_tokens=True) == ""
    assert named(fresh, list(new.ids)) == [("<|call|>", True)]


def test_spare_rows_are_used_first() -> None:
    config = PRESETS["tiny"]
    for first, count, rows in ((256, 2, 258), (250, 2, 256), (255, 2, 257), (254, 2, 256)):
        new = NewTokens(("<x>",) * count, first, ((1,),) * count)
        assert new.grown(config).vocab_size == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", "has 'hello' already"),
        (" the", "has ' the' already"),
        ("Ġthe", "has 'Ġthe' already"),
        ("<|im_end|>", "already"),
        ("Çatalhöyük", "'Çatalhöyük' is read or written otherwise"),
    ],
)
def test_what_is_there_or_does_not_come_back_is_refused(fresh, text: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"data\.new_tokens: .*{words}".replace("|", r"\|")):
        add(fresh, "<fine>", text)


def test_rows_that_a_model_lacks_already_are_refused(fresh) -> None:
    with pytest.raises(UserError, match="49152 tokens and the model rows for 49000"):
        add(fresh, "<x>", vocab_size=49000)


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16", "fp32", None])
def test_a_row_begins_as_the_mean_of_its_pieces(tiny_folder: Path, fresh, codec) -> None:
    model = load_causal_lm(tiny_folder, base_weights=codec)
    old = model.config.vocab_size
    new = add(fresh, "<tool>", "<|city|>")
    before = [m.dequantised().clone() for m in (model.model.embed_tokens, model.lm_head)]
    assert [len(of_token) > 1 for of_token in new.pieces] == [True, True]
    grow(model, new)
    assert model.config.vocab_size == model.model.config.vocab_size == old + 2
    for module, matrix in zip((model.model.embed_tokens, model.lm_head), before, strict=True):
        now = module.dequantised()
        assert torch.equal(now[:old], matrix)
        for row, of_token in zip(now[old:], new.pieces, strict=True):
            torch.testing.assert_close(row, sum(matrix[i] for i in of_token) / len(of_token))


def test_models_on_one_base_have_rows_of_their_own(tiny_folder: Path, fresh) -> None:
    model = load_causal_lm(tiny_folder, base_weights="bf16")
    grow(model, add(fresh, "<tool>"))
    other = same_weights(model)
    for name, rows in row_parameters(model).items():
        weight, its = model.get_submodule(name).weight, other.get_submodule(name).weight
        assert its.base is weight.base
        assert its.new_NE is row_parameters(other)[name]
        assert its.new_NE is not rows
        assert torch.equal(its.new_NE, rows)
