"""Rewards: ids, the token that is read, loss and gradients are those of trl's RewardTrainer."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from llamaweft.data.formats import to_examples
from llamaweft.data.pairs import PairEncoder
from llamaweft.data.sources import Row
from llamaweft.export.hf import export_merged
from llamaweft.export.parity import auto_class
from llamaweft.model.head_config import HeadConfig
from llamaweft.model.llama import with_head
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.model.task_heads import TaskHead


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


SYSTEM = said("system", "You are a helpful assistant who answers in one short sentence.")
ASKED = [SYSTEM, said("user", "What is the capital of Peru, and on which river is it?")]
MORE = [said("assistant", "Lima."), said("user", "And the river?")]
ROWS = {
    "messages": [
        {
            "prompt": ASKED,
            "chosen": [said("assistant", "Lima, on the Rímac.")],
            "rejected": [said("assistant", "I do not know, and I will say so at length. " * 3)],
        },
        {
            "prompt": [*ASKED, *MORE],
            "chosen": [said("assistant", "The Rímac.")],
            "rejected": [said("assistant", " The Amazon 🎉\n")],
        },
    ],
    "messages without a prompt": [
        {
            "chosen": [*ASKED, *MORE, said("assistant", "The Rímac.")],
            "rejected": [*ASKED, said("assistant", "Cusco.")],
        },
        {
            "chosen": [said("user", "Hi"), said("assistant", "Hello!")],
            "rejected": [said("user", "Hi"), said("assistant", "")],
        },
    ],
    "text": [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, and so is the sea."},
        {"prompt": "Roses are", "chosen": " red<|im_end|>", "rejected": " late"},
        {"prompt": "<|im_start|>user\nHi<|im_end|>\n", "chosen": "Hello", "rejected": "Go away."},
    ],
    "text without a prompt": [
        {"chosen": "Roses are red and violets are blue", "rejected": "Roses are late"},
        {"chosen": "One", "rejected": "Two, three and four"},
    ],
}


def padded(tokenizer, padding: str | None):
    """The tokenizer with another padding token; its own is its end token."""
    other = deepcopy(tokenizer)
    other.pad_token = padding
    return other


def model_of(folder: Path, tokenizer, target: Path, coefficient: float = 0.0):
    """Ours, and the same weights in transformers."""
    import transformers

    torch.manual_seed(3)
    causal = load_causal_lm(folder, base_weights=None)
    config = HeadConfig("reward", (), center_rewards_coefficient=coefficient)
    ours = with_head(causal, TaskHead(config, causal.config.hidden_size, causal.device)).train()
    target.mkdir()
    export_merged(ours, tokenizer, target, "fp32", [2])
    kind = getattr(transformers, auto_class(ours))
    return ours, kind.from_pretrained(target, dtype=torch.float32)


def trainer(model, rows: list[dict], tokenizer, folder: Path, **settings) -> RewardTrainer:
    settings |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    config = RewardConfig(str(folder), report_to="none", disable_tqdm=True, **settings)
    data = Dataset.from_list(rows)
    return RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)


def documents(rows: list[dict], tokenizer):
    given = [Row("f", "line", number, row) for number, row in enumerate(rows, start=1)]
    return PairEncoder(tokenizer)(list(to_examples(given, "reward")))


@pytest.mark.parametrize("padding", ["<|endoftext|>", "<|im_end|>", None])
@pytest.mark.parametrize("kind", ROWS)
def test_ids_loss_and_gradients_are_those_of_trl(
    tiny_folder, tokenizer, tmp_path, kind, padding
) -> None:
    """Where the end token pads, or there is no other, trl reads the token before it."""
    rows, tokenizer = ROWS[kind], padded(tokenizer, padding)
    coefficient = None if padding is None else 0.3
    ours, theirs = model_of(tiny_folder, tokenizer, tmp_path / "hf", coefficient or 0.0)
    assert theirs.config.pad_token_id == (0 if padding == "<|endoftext|>" else 2)
    trl = trainer(
        theirs, rows, padded(tokenizer, padding), tmp_path, center_rewards_coefficient=coefficient
    )
    pairs = documents(rows, tokenizer)
    for pair, row in zip(pairs, trl.train_dataset, strict=True):
        chosen, rejected = (ids.tolist() for ids in pair.texts)
        assert (chosen, rejected) == (row["chosen_ids"], row["rejected_ids"])

    expected = trl.compute_loss(theirs.train(), trl.data_collator(list(trl.train_dataset)))
    expected.backward()
    gradients = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(gradients)
    for share in (False, True):
        ours.zero_grad()
        total, count = ours.loss(Pack.from_documents(pairs, share=share))
        assert count == len(rows)
        torch.testing.assert_close(total / count, expected, rtol=1e-5, atol=0)
        (total / count).backward()
        # transformers never trains the embedding of the padding token, though chats hold it.
        ours.model.embed_tokens.weight.grad[theirs.config.pad_token_id] = 0
        for name, parameter in ours.named_parameters():
            difference = (parameter.grad - gradients[name].grad).norm()
            assert difference <= 1e-5 * gradients[name].grad.norm(), (name, share)


def test_rewards_are_those_of_transformers(tiny_folder, tokenizer, tmp_path) -> None:
    """Read where training reads them, each text by itself and without a word of where."""
    for kind, rows in ROWS.items():
        ours, theirs = model_of(tiny_folder, tokenizer, tmp_path / kind)
        pairs = documents(rows, tokenizer)
        read = ours.eval().read(Pack.from_documents(pairs, share=True))
        for pair, (logits, _) in zip(pairs, read, strict=True):
            alone = [
                theirs(torch.from_numpy(ids.astype(np.int64))[None]).logits[0] for ids in pair.texts
            ]
            torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=1e-6)


def test_held_out_rewards_are_not_centred(tiny_folder, tokenizer, tmp_path) -> None:
    ours, _ = model_of(tiny_folder, tokenizer, tmp_path / "hf", coefficient=5.0)
    pack = Pack.from_documents(documents(ROWS["messages"], tokenizer))
    trained, _ = ours.loss(pack)
    measured = [(float(a - b), loss) for (a, b), (loss, _) in ours.eval().read(pack)]
    for margin, loss in measured:
        assert loss == pytest.approx(np.log1p(np.exp(-margin)), rel=1e-5)
    assert trained > sum(loss for _, loss in measured)
