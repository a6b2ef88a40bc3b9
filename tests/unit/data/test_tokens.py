"""Where tokens are, told by their lengths, is where the tokenizers library says they are."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from llamaweft.data.template import Span
from llamaweft.data.tokens import TextTokenizer, Tokens
from llamaweft.model.tokenizer import load_tokenizer

NOTHING = re.compile(r"(?!)")
CORE = load_tokenizer("builtin:smollm2-135m").backend_tokenizer
TOKENIZER = TextTokenizer(CORE, NOTHING)
PIECES = [*"ab \n0,é€🦙\u0301\u200d", "<|im_end|>"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


def by_the_library(core: Tokenizer, text: str) -> Tokens:
    encoding = core.encode(text, add_special_tokens=False)
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return Tokens(text, np.array(encoding.ids), places[:, 1], places[:, 0])


@settings(deadline=None)
@given(text=TEXTS, data=st.data())
def test_lengths_say_what_offsets_say(text, data):
    (encoding,) = TOKENIZER.encode([text], places=True)
    ours, theirs = TOKENIZER.tokens(text, encoding), by_the_library(CORE, text)
    assert ours.ids.tolist() == theirs.ids.tolist()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    assert ours.first_from(start) == theirs.first_from(start)
    assert ours.count_until(end) == theirs.count_until(end)
    if start < end:
        assert ours.touching(Span(start, end)) == theirs.touching(Span(start, end))


def test_a_normaliser_that_changes_lengths_leaves_the_offsets_to_the_library():
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "Ġ": 2}, merges=[]))
    core.normalizer = normalizers.Replace("é", "a")
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = TextTokenizer(core, NOTHING)
    (encoding,) = texts.encode(["ééab"], places=True)
    tokens = texts.tokens("ééab", encoding)  # four tokens for six bytes
    assert tokens.ids.tolist() == [0, 0, 0, 1]
    assert tokens.first_from(3) == 3  # the b


def test_said_begins_inside_a_character_only_as_a_broken_one():
    (encoding,) = TOKENIZER.encode(["🦙 "], places=True)
    tokens = TOKENIZER.tokens("🦙 ", encoding)
    assert tokens.said(len(tokens.ids) - 1, 2) == " "
    assert tokens.said(1, 1).strip()  # the rest of the llama is no white space
