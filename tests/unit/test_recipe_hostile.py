"""A recipe from a stranger: it makes no object, unfolds to no flood, and is refused in one sentence."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llamaweft.errors import UserError
from llamaweft.recipe import MAX_BYTES, Recipe, describe

MINIMAL = "model: some/model\ndata: {train: chats.jsonl}\n"


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.system ["touch {marker}"]',
        '!!python/object/new:subprocess.Popen [["touch", "{marker}"]]',
        "!!python/name:os.system ''",
        "!!python/module:os ''",
        "!!python/tuple [1, 2]",
        "!!binary aGVsbG8=",
        "!!set {{a, b}}",
        "!!timestamp 2001-01-01",
        "!own value",
        "! value",
        "!!str value",
    ],
)
@pytest.mark.parametrize(
    "place", ["model: {}\ndata: {{train: a.jsonl}}\n", "{}\n", "model: a/b\nx: [{}]\n"]
)
def test_a_tag_makes_no_object(place: str, value: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(UserError, match=r"has the tag .*; a recipe holds plain values"):
        Recipe.load_text(place.format(value.format(marker=marker)), "recipe.yaml")
    assert not marker.exists()


def test_an_alias_of_a_value_before_is_that_value() -> None:
    shared = MINIMAL.replace("train: chats.jsonl", "train: [&a {path: x.jsonl}, *a]")
    assert [rows.path for rows in Recipe.load_text(shared).data.train] == ["x.jsonl"] * 2


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
        "model: &a [*a]\n",
        "model: &a {b: *a}\n",
        "data: {train: &a [&b {path: [*a, *b]}]}\n",
    ],
    ids=["laughs", "a list in itself", "a mapping in itself", "in each other"],
)
def test_what_unfolds_without_end_is_refused_at_once(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"unfolds to more than 100,000 values|inside of what it"):
        Recipe.load_text(text)
    assert time.monotonic() - began < 5


def test_what_is_nested_or_long_beyond_reason_is_refused(tmp_path: Path) -> None:
    for text in ("[" * 50_000, "a: " * 3000, "- " * 3000 + "x", "{a: " * 5000 + "}" * 5000):
        with pytest.raises(UserError, match=r"nested too deeply|is not valid YAML"):
            Recipe.load_text(text)
    path = tmp_path / "rows.yaml"
    path.write_text(MINIMAL + "# " + "x" * MAX_BYTES)
    with pytest.raises(UserError, match="has more than 1 MiB"):
        Recipe.load(path)


def test_a_long_wrong_value_is_shown_shortened() -> None:
    with pytest.raises(UserError) as refused:
        Recipe.load_text(MINIMAL + f"training: {{max_steps: {'x' * 5000}}}\n")
    assert len(str(refused.value)) < 1000


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
SCALARS |= st.sampled_from(
    ["auto", "lora", "none", "fp32", "chat", "loss", "a.jsonl", "8GiB", "1e-4"]
)
KEYS = st.sampled_from(sorted({part for key in describe() for part in key.split(".")})) | st.text(
    max_size=5
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, TREES, max_size=6))
@example({"data": {}})
def test_any_tree_is_a_recipe_or_refused(tree: dict) -> None:
    try:
        recipe = Recipe.load_text(json.dumps({"model": "a/b", "data": {"train": "c.jsonl"}} | tree))
    except UserError:
        return
    assert Recipe.load_text(recipe.dump()) == recipe or "nan" in str(recipe)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_any_text_is_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, text: str | bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    with pytest.raises(UserError):
        Recipe.load(path)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(KEYS, KEYS, TREES), max_size=3))
def test_any_override_is_taken_or_refused(changes: list) -> None:
    overrides = [f"{a}.{b}={json.dumps(value)}" for a, b, value in changes]
    with suppress(UserError):
        Recipe.load_text(MINIMAL, overrides=overrides)
