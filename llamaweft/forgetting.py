"""Where pieces, model and evaluation meet to measure what is forgotten (docs/evaluation.md)."""

from __future__ import annotations

from pathlib import Path

from llamaweft.evaluate.forgetting import ForgettingGuard
from llamaweft.model.divergence import Reference, read_hidden
from llamaweft.model.llama import LlamaForCausalLM, Model
from llamaweft.model.pack import Pack
from llamaweft.pieces.pieces import Pieces


def build_guard(
    pieces: Pieces, model: Model, kept: Path, *, resumes: bool
) -> ForgettingGuard | None:
    """Compares with the model as it is now, before its first step; None where the recipe does not
    ask for it.

    kept: a file for what the model says now. A run that resumes takes it from there, since its
    model began elsewhere (adapter.init_from); raises UserError where it cannot.
    """
    settings, general = pieces.recipe.forgetting, pieces.general
    if settings is None or general is None:
        return None
    assert isinstance(model, LlamaForCausalLM)
    model.eval()
    batches = general.batches(pieces.recipe.training.micro_batch_tokens)
    packs = [Pack.from_documents(documents, share=True) for documents in batches]
    reference = Reference(
        model,
        packs,
        new=range(0) if pieces.new_tokens is None else pieces.new_tokens.ids,
        hidden_NE=read_hidden(kept, packs, model.config.hidden_size) if resumes else None,
    )
    if not resumes and pieces.ranks.first:
        reference.save(kept)
    return ForgettingGuard(
        general=general,
        tokenizer=pieces.tokenizer,
        compare=reference.compare,
        max_kl=settings.max_kl,
        when_exceeded=settings.when_exceeded,
        answered=settings.answers,
        max_new_tokens=settings.max_new_tokens,
        cache_bytes=pieces.cache_bytes,
    )
