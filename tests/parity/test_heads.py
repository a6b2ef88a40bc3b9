"""Heads of tasks: loss and gradients are those of transformers' models of the same names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from llamaweft.data.chat import Document
from llamaweft.data.targets import LABEL, LAST, NO_CLASS
from llamaweft.export.hf import export_merged
from llamaweft.export.parity import auto_class
from llamaweft.model.head_config import HeadConfig
from llamaweft.model.llama import with_head
from llamaweft.model.load import load_causal_lm
from llamaweft.model.pack import Pack
from llamaweft.model.task_heads import TaskHead

random = np.random.default_rng(0)
TEXTS = [random.integers(5, 900, length) for length in (9, 1, 14)]
NAMES = ("no", "maybe", "yes")
CASES = {
    "one of several": (
        HeadConfig("sequence_classification", NAMES),
        [[(LAST, 2)], [(LAST, 0)], [(LAST, 1)]],
    ),
    "any of several": (
        HeadConfig("sequence_classification", NAMES, many=True),
        [[(LAST, 0), (LAST, 2)], [(LAST, NO_CLASS)], [(LAST, 1)]],
    ),
    "a number": (HeadConfig("regression", ()), [[(LAST, 0.5)], [(LAST, -2.0)], [(LAST, 7.25)]]),
    "tags": (
        HeadConfig("token_classification", NAMES),
        [[(1, 0), (4, 2), (8, 1)], [(0, 1)], [(3, 2), (5, 2), (13, 0)]],
    ),
    "answers": (
        HeadConfig("question_answering", ()),
        [[(3, 0), (5, 1)], [(0, 0), (0, 1)], [(9, 0), (9, 1)]],
    ),
}


def documents(task: str, labels: list[list[tuple[int, float]]]) -> list[Document]:
    found = []
    for ids, given in zip(TEXTS, labels, strict=True):
        weight = 1.0 if task == "token_classification" else 1 / len(given)
        table = np.array([(place, target, weight) for place, target in given], LABEL)
        found.append(Document(ids.astype(np.int32), np.zeros(len(ids), np.float32), "", table))
    return found


def headed(folder: Path, config: HeadConfig):
    torch.manual_seed(3)
    causal = load_causal_lm(folder, base_weights=None)
    return with_head(causal, TaskHead(config, causal.config.hidden_size, causal.device))


def exported(model, tokenizer, folder: Path):
    """The same weights in transformers, which pools what is not padding."""
    folder.mkdir()
    export_merged(model, tokenizer, folder, "fp32", [2])
    kind = getattr(transformers, auto_class(model))
    return kind.from_pretrained(folder, dtype=torch.float32)


def by_transformers(theirs, config: HeadConfig, labels) -> torch.Tensor:
    """The loss that transformers gives each document, summed over documents, or over tags."""
    total = torch.zeros(())
    for ids, given in zip(TEXTS, labels, strict=True):
        row = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
        match config.task:
            case "question_answering":
                start, end = ([p for p, side in given if side == s] for s in (0, 1))
                row |= {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
                total = total + theirs(**row).loss
            case "token_classification":
                targets = torch.full((1, len(ids)), -100)
                for place, tag in given:
                    targets[0, place] = tag
                total = total + theirs(**row, labels=targets).loss * len(given)
            case "regression":
                total = total + theirs(**row, labels=torch.tensor([given[0][1]])).loss
            case _ if config.many:
                holds = torch.zeros(1, config.outputs)
                for _, label in given:
                    holds[0, label] = float(label >= 0)
                holds = holds if given[0][1] >= 0 else torch.zeros(1, config.outputs)
                total = total + theirs(**row, labels=holds).loss
            case _:
                total = total + theirs(**row, labels=torch.tensor([given[0][1]])).loss
    return total


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_transformers(
    tiny_folder, tokenizer, tmp_path, case, share
) -> None:
    config, labels = CASES[case]
    if share and config.task == "question_answering":
        pytest.skip("a head that reads all of a document shares nothing")
    ours = headed(tiny_folder, config).train()
    theirs = exported(ours, tokenizer, tmp_path / "exported").train()
    pack = Pack.from_documents(documents(config.task, labels), share=share)
    loss, count = ours.loss(pack)
    expected = by_transformers(theirs, config, labels)
    assert count == pytest.approx(sum(len(g) for g in labels) if case == "tags" else 3)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - gradients[name].grad).norm()
        assert difference <= 1e-5 * gradients[name].grad.norm() + 1e-6, name
    assert {n for n, _ in ours.named_parameters()} == set(gradients)


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_does_not_depend_on_the_pack(tiny_folder, case) -> None:
    config, labels = CASES[case]
    model = headed(tiny_folder, config).eval()
    rows = documents(config.task, labels)
    together = model.read(Pack.from_documents(rows, share=config.name == "score"))
    for row, (logits, loss) in zip(rows, together, strict=True):
        ((alone, own_loss),) = model.read(Pack.from_documents([row]))
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-6)
        assert loss == pytest.approx(own_loss, rel=1e-5)


def test_class_weights_weigh_labels_as_torch_does(tiny_folder) -> None:
    config, labels = CASES["one of several"]
    model = headed(tiny_folder, config).train()
    weights = torch.tensor([0.5, 2.0, 3.0])
    rows = documents(config.task, labels)
    for row in rows:
        row.labels["weight"] *= weights[row.labels["target"].astype(int)].numpy()
    total, count = model.loss(Pack.from_documents(rows))
    logits = torch.cat([one for one, _ in model.read(Pack.from_documents(rows))])
    targets = torch.tensor([given[0][1] for given in labels])
    torch.testing.assert_close(total / count, F.cross_entropy(logits, targets, weight=weights))


def test_label_smoothing_is_torchs(tiny_folder) -> None:
    config = HeadConfig("token_classification", NAMES, label_smoothing=0.2)
    model = headed(tiny_folder, config).train()
    pack = Pack.from_documents(documents(config.task, CASES["tags"][1]))
    logits = torch.cat([one for one, _ in model.read(pack)])
    targets = pack.label_target_N.long()
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(model.loss(pack)[0], expected)


def test_label_smoothing_of_the_next_token_is_torchs(tiny_folder) -> None:
    model = load_causal_lm(tiny_folder, base_weights=None).train()
    model.lm_head.label_smoothing = 0.3
    ids = TEXTS[2].astype(np.int32)
    pack = Pack.from_documents([Document(ids, np.ones(len(ids), np.float32), "")])
    total, _ = model.loss(pack)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(pack)[pack.label_position_N]
    targets = pack.label_target_N
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3, reduction="sum")
    torch.testing.assert_close(total, expected)
    expected.backward()
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_neftune_adds_what_transformers_adds(tiny_folder) -> None:
    """transformers.integrations.neftune: uniform within alpha / sqrt(L E), for each document."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = load_causal_lm(tiny_folder, base_weights=None).train()
    rows = [Document(ids.astype(np.int32), np.ones(len(ids), np.float32), "") for ids in TEXTS]
    pack = Pack.from_documents(rows)
    embedded = torch.zeros(pack.tokens, model.config.hidden_size)
    torch.manual_seed(7)
    noise = model.model._noise(embedded, pack, 5.0)
    torch.manual_seed(7)
    module = torch.nn.Module().train()
    module.neftune_noise_alpha = 5.0
    parts = [neftune_post_forward_hook(module, None, torch.zeros(1, len(i), 64)) for i in TEXTS]
    torch.testing.assert_close(noise, torch.cat([part[0] for part in parts]), rtol=1e-5, atol=1e-7)

    plain, _ = model.loss(pack)
    model.model.neftune_noise_alpha = 5.0
    assert model.loss(pack)[0] != plain
    model.eval()
    assert model.loss(pack)[0] == plain
