"""KL and losses from hidden states: against full logits, whatever the head is held in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llamaweft.data.general import general_prompts, read_general
from llamaweft.errors import UserError
from llamaweft.model import divergence as module
from llamaweft.model.divergence import Reference, divergence, kept_head, read_hidden
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.weights.frozen import FrozenWeight, encode
from llamaweft.weights.grown import GrownWeight

V, E, N = 3000, 64, 300


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """So that labels and vocabulary are cut in several tiles."""
    monkeypatch.setattr(module, "tile_size", lambda width, dtype: 350)


def frozen(w_VE: torch.Tensor, codec: str) -> FrozenWeight:
    return FrozenWeight(codec, tuple(w_VE.shape), encode(codec, w_VE))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full(
    then_VE: torch.Tensor, then_NE: torch.Tensor, now_VE: torch.Tensor, now_NE: torch.Tensor,
    target_N: torch.Tensor, known: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """From whole logits in fp64; `known`: the rows that the model had then."""
    old = (then_NE.double() @ then_VE.double()[known].t()).log_softmax(-1)
    new = (now_NE.double() @ now_VE.double().t()).log_softmax(-1)
    kl_N = F.kl_div(new[:, known], old, log_target=True, reduction="none").sum(-1)
    place_N = torch.searchsorted(known, target_N)
    return [kl_N, F.nll_loss(old, place_N, reduction="none"), F.nll_loss(new, target_N, reduction="none")]  # fmt: skip


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_tiles")
def test_a_frozen_heads_divergence_is_that_of_full_logits(codec: str, dtype: torch.dtype) -> None:
    """fp32 sums against fp64: 1e-5. In bf16 both multiply the same rounded numbers."""
    head = frozen(random(V, E, seed=1) / 4, codec)
    then_NE, now_NE = (random(N, E, seed=s).to(dtype) for s in (2, 3))
    target_N = torch.arange(N) * 9 % V
    found = divergence((then_NE, head), (now_NE, head), target_N)
    w_VE = head.dequantised(dtype).float()
    expected = full(w_VE, then_NE, w_VE, now_NE, target_N, torch.arange(V))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert found[0].min() > 0.1


@pytest.mark.parametrize("first", [0, 1000, V - 20, V])
@pytest.mark.usefixtures("small_tiles")
def test_tokens_that_are_new_have_no_share_in_what_was(first: int) -> None:
    """In place of rows that the matrix had to spare, at its end, and after it."""
    base_VE = random(V, E, seed=1) / 4
    new_NE = nn.Parameter(random(20, E, seed=4))
    grown = GrownWeight(frozen(base_VE, "fp32"), first, new_NE)
    then_NE, now_NE = random(N, E, seed=2), random(N, E, seed=3)
    rows = torch.arange(grown.shape[0])
    known = rows[(rows < first) | (rows >= first + 20)]
    target_N = known[torch.arange(N) * 7 % len(known)]
    new = range(first, first + 20)
    expected = full(grown.dequantised(), then_NE, grown.dequantised(), now_NE, target_N, known)
    model = type("M", (), {"lm_head": type("H", (), {"weight": grown})})
    trained = nn.Parameter(grown.dequantised())
    for then, now in ((kept_head(model), grown), (trained.detach().clone(), trained)):
        found = divergence((then_NE, then), (now_NE, now), target_N, new)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_logits_far_from_zero_neither_overflow_nor_vanish() -> None:
    head = frozen(random(V, E, seed=1) * 30, "fp32")
    then_NE, now_NE = random(N, E, seed=2), random(N, E, seed=2) * 1.001
    target_N = torch.zeros(N, dtype=torch.int64)
    kl_N, before_N, after_N = divergence((then_NE, head), (now_NE, head), target_N)
    expected = full(head.dequantised(), then_NE, head.dequantised(), now_NE, target_N, torch.arange(V))  # fmt: skip
    torch.testing.assert_close(before_N, expected[1], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(after_N, expected[2], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(kl_N, expected[0], rtol=1e-2, atol=1e-3)


def test_a_trained_head_is_copied_and_a_frozen_one_is_not(tiny_folder: Path) -> None:
    held = load_causal_lm(tiny_folder, base_weights="bf16")
    assert kept_head(held) is held.lm_head.weight
    trained = load_causal_lm(tiny_folder, base_weights=None)
    copy = kept_head(trained)
    with torch.no_grad():
        trained.lm_head.weight.add_(1)
    assert torch.equal(copy + 1, trained.lm_head.weight)


def packs_of(tokenizer) -> list[Pack]:
    general = read_general(general_prompts(5), tokenizer)
    return [Pack.from_documents(batch, share=True) for batch in general.batches(200)]


def test_an_untouched_model_has_not_moved_at_all(tiny_folder: Path, tokenizer) -> None:
    for codec in ("nf4", None):
        model = load_causal_lm(tiny_folder, base_weights=codec)
        packs = packs_of(tokenizer)
        rows = Reference(model, packs).compare(model)
        assert len(rows) == 5
        assert [row.kl for row in rows] == [0.0] * 5
        losses = [loss for pack in packs for loss in model.sequence_losses(pack)]
        for row, (total, labels) in zip(rows, losses, strict=True):
            assert row.before == row.after == pytest.approx(total, rel=1e-5)
            assert row.labels == labels


def test_what_is_kept_is_read_back_and_other_files_are_refused(
    tiny_folder: Path, tokenizer, tmp_path: Path
) -> None:
    model = load_causal_lm(tiny_folder, base_weights=None)
    packs, path = packs_of(tokenizer), tmp_path / "forgetting.safetensors"
    reference = Reference(model, packs)
    reference.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    size = model.config.hidden_size
    read = read_hidden(path, packs, size)
    assert torch.equal(read, reference.hidden_NE)
    head = kept_head(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    moved = Reference(model, packs, hidden_NE=read)  # as a run that goes on: the head it has now
    moved.head = head
    assert moved.compare(model) == reference.compare(model)
    assert sum(row.kl for row in moved.compare(model)) > 0.01
    with pytest.raises(UserError, match="of other prompts"):
        read_hidden(path, packs[1:], size)
    path.write_bytes(path.read_bytes()[:100])
    for damaged in (path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"cannot be read .*start a new run"):
            read_hidden(damaged, packs, size)
