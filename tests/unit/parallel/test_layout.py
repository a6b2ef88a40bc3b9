"""A mesh has a place for each rank, and what does not fit is a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llamaweft.errors import UserError
from llamaweft.model.presets import PRESETS
from llamaweft.parallel.lags import STEPS, Lags
from llamaweft.parallel.layout import Layout, Place, check_model, check_packs, check_world


def test_ranks_count_with_tensor_fastest() -> None:
    layout = Layout(data=2, shard=3, tensor=2)
    assert layout.world == 12
    assert layout.pack_ranks == 6
    places = [layout.place(rank) for rank in range(12)]
    assert places[:4] == [Place(0, 0, 0), Place(0, 0, 1), Place(0, 1, 0), Place(0, 1, 1)]
    assert places[5:7] == [Place(0, 2, 1), Place(1, 0, 0)]
    assert len({*places}) == 12


def test_a_layout_says_what_it_is() -> None:
    assert str(Layout()) == "one process"
    assert str(Layout(data=2, tensor=4)) == "data 2 x tensor 4"
    assert str(Layout(shard=2, offload=True)) == "shard 2, offloaded"


def test_another_number_of_processes_is_refused() -> None:
    check_world(Layout(data=2, shard=2), 4)
    with pytest.raises(UserError, match=r"data 2 x shard 2 x tensor 1 is 4 processes, and 3 were"):
        check_world(Layout(data=2, shard=2), 3)


def test_a_model_that_cannot_be_cut_so_is_refused() -> None:
    config = PRESETS["llama3-8b"]
    for tensor in (1, 2, 4, 8):
        check_model(Layout(tensor=tensor), config)
    with pytest.raises(UserError, match=r"num_key_value_heads, 8; it may be 1, 2, 4 or 8"):
        check_model(Layout(tensor=16), config)
    with pytest.raises(UserError, match=r"vocab_size, 128257; it may be 1 only"):
        check_model(Layout(tensor=2), replace(config, vocab_size=128257))


def test_ranks_without_packs_are_refused() -> None:
    check_packs(Layout(data=2, shard=2, tensor=8), accumulation=4, packs=4)
    with pytest.raises(UserError, match="4 ranks have packs of their own, and the run has 3"):
        check_packs(Layout(data=2, shard=2), accumulation=4, packs=3)
    with pytest.raises(UserError, match="gradient_accumulation_steps: 2 over all ranks"):
        check_packs(Layout(data=4), accumulation=2, packs=100)


def test_a_rank_that_lags_is_found_once_it_lags_for_long() -> None:
    lags = Lags()
    found = [lags.of([1.0, 1.1, 2.0, 1.0]) for _ in range(2 * STEPS)]
    assert [n for n, ranks in enumerate(found, 1) if ranks] == [STEPS, 2 * STEPS]
    assert found[STEPS - 1] == [(2, 2.0)]
    assert not any(Lags().of([1.0, 1.2]) for _ in range(9))


def test_a_rank_that_catches_up_does_not_lag() -> None:
    lags = Lags()
    for _ in range(STEPS - 2):
        assert not lags.of([1.0, 3.0, 1.0])
    assert not lags.of([1.0, 1.0, 1.0])
    for _ in range(STEPS - 1):
        assert not lags.of([1.0, 3.0, 1.0])
