"""Ranks that are about to do different runs are told so; methods that ranks cannot share too."""

from __future__ import annotations

from typing import Any

import pytest

from llamaweft.errors import UserError
from llamaweft.parallel.agreement import check_same, digest, versions
from llamaweft.parallel.layout import Layout
from llamaweft.parallel.methods import check_method
from llamaweft.parallel.ranks import ALONE, Ranks
from llamaweft.recipe import Recipe


class Told(Ranks):
    """Ranks that say what they are told to."""

    def __init__(self, said: list[dict[str, str]]) -> None:
        super().__init__(Layout())
        self.said = said

    def gather(self, value: Any) -> list[Any]:
        return self.said


SAME = {"the recipe": digest({"a": 1}), "the data": digest([1, 2]), "the versions": versions()}


def test_the_same_everywhere_is_fine() -> None:
    check_same(ALONE, SAME)
    check_same(Told([SAME, dict(SAME), dict(SAME)]), SAME)


@pytest.mark.parametrize("name", SAME)
def test_what_differs_is_named_with_its_ranks(name: str) -> None:
    other = SAME | {name: "other"}
    with pytest.raises(UserError) as found:
        check_same(Told([SAME, other, SAME, other, SAME]), SAME)
    assert f"{name} must be the same on all ranks" in str(found.value)
    assert f"{SAME[name]} on ranks 0, 2, 4; other on ranks 1, 3" in str(found.value)


def test_a_digest_is_of_the_content_alone() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def recipe(text: str) -> Recipe:
    return Recipe.load_text(f"model: m\ndata: {{train: a.jsonl}}\n{text}")


IN_BACKWARD = (
    "training: {optimizer_in_backward: true, gradient_accumulation_steps: 1, max_grad_norm: null}"
)
REFUSED = [
    ({"data": 2}, IN_BACKWARD, "optimizer_in_backward"),
    ({"shard": 2}, "adapter: {modules_to_save: [lm_head]}", "adapter.modules_to_save"),
    ({"shard": 2}, "adapter: {method: none, top_layers: 2}", "adapter.top_layers"),
    ({"tensor": 2}, "training: {optimizer: adamw_8bit}", "adamw_8bit"),
    ({"tensor": 2}, "adapter: {method: dora}", "dora takes the norms of whole rows"),
    ({"tensor": 2}, "adapter: {init_lora_weights: pissa}", "pissa starts from whole matrices"),
]


@pytest.mark.parametrize(("layout", "text", "said"), REFUSED)
def test_a_method_that_cannot_be_shared_is_refused(
    layout: dict[str, int], text: str, said: str
) -> None:
    check_method(Layout(), recipe(text))
    with pytest.raises(UserError, match=said):
        check_method(Layout(**layout), recipe(text))


def test_methods_that_can_be_shared_are_not_refused() -> None:
    for layout in (Layout(data=2), Layout(shard=2), Layout(tensor=2), Layout(2, 2, 2)):
        check_method(layout, recipe("adapter: {r: 4}"))
        check_method(layout, recipe("adapter: {method: none}"))
    check_method(Layout(data=2), recipe("training: {optimizer: adamw_8bit}"))
    check_method(Layout(data=2, shard=2), recipe("adapter: {method: dora}"))
