"""Rows with a target of their own: the tokens are the tokenizer's, the labels stand where a head
reads them, and what is prepared says the same as what was encoded."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight
from test_prepare import StoppedError, stop_at, write
from tokenizers.processors import TemplateProcessing

from llamaweft.data import build
from llamaweft.data.classes import find_classes
from llamaweft.data.formats import to_examples
from llamaweft.data.holdout import hold_out
from llamaweft.data.prepare import Preparation, Prepared
from llamaweft.data.sources import PlainSource, read_rows
from llamaweft.data.store import StoredRows, Writer
from llamaweft.data.targets import LAST, NO_CLASS, TargetEncoder
from llamaweft.errors import UserError

CLASSES, NUMBER, TAGS, ANSWERS = (
    "sequence_classification",
    "regression",
    "token_classification",
    "question_answering",
)


@pytest.fixture(autouse=True)
def small_chunks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "CHUNK", 4)
    monkeypatch.setattr(build, "CHUNKS_A_COMMIT", 1)


@pytest.fixture
def rows(tmp_path: Path):
    """Writes rows to a file; a second file has another name."""

    def of(*content: dict, name: str = "rows.jsonl") -> PlainSource:
        return PlainSource(str(write(tmp_path / name, list(content))))

    return of


def preparation(tokenizer, task: str, **options) -> Preparation:
    settings = {"train_on": "assistant", "max_length_tokens": 500, "seed": 0, "on_too_long": None}
    return Preparation(tokenizer, task, **settings | options)


def prepare(tokenizer, task: str, train, held=None, fraction=None, **options) -> Prepared:
    return preparation(tokenizer, task, **options).prepare([(train, 1.0)], held, fraction)


def encoded(tokenizer, task: str, source: PlainSource) -> tuple[TargetEncoder, list]:
    encoder = TargetEncoder(tokenizer, task)
    return encoder, encoder(list(to_examples(read_rows(source), task)))


def labels(document) -> list[tuple[int, float, float]]:
    return [(int(p), float(t), float(w)) for p, t, w in document.labels.tolist()]


def finding(prepared: Prepared, check: str):
    return next(f for f in prepared.audit.findings if f.check == check)


# --- where labels stand ------------------------------------------------------------------------


def test_ids_are_the_tokenizers(tokenizer, rows) -> None:
    pairs = [("Grüße aus Köln", None), ("first one", " second <|im_end|>"), ("日本語 text 🎉", "")]
    source = rows(
        *({"text": a, "label": "x"} | ({} if b is None else {"text_pair": b}) for a, b in pairs)
    )
    _, documents = encoded(tokenizer, CLASSES, source)
    for (first, second), document in zip(pairs, documents, strict=True):
        given = (first,) if second is None else (first, second)
        assert document.ids.tolist() == tokenizer(*given)["input_ids"]
        assert labels(document) == [(LAST, 0, 1)]


def test_the_label_of_a_text_survives_truncation(tokenizer, rows) -> None:
    source = rows(*({"text": "word " * 40 * n, "label": n} for n in (1, 2, 1, 2)))
    options = {"on_too_long": "truncate", "max_length_tokens": 30}
    found = prepare(tokenizer, CLASSES, source, **options)
    assert [(len(d.ids), labels(d)) for d in found.documents] == [
        (30, [(LAST, n, 1)]) for n in (0, 1, 0, 1)
    ]


WORDS = ["Straßenbahnhaltestelle", "in", "東京都", "🎉🎉", "naïveté", ".", "O'Neill-Smith"]


def test_tags_stand_at_the_last_token_of_their_word(tokenizer, rows) -> None:
    tags = ["A", "O", "B", "O", "A", "O", "B"]
    encoder, (document,) = encoded(tokenizer, TAGS, rows({"tokens": WORDS, "tags": tags}))
    ids = tokenizer(" ".join(WORDS))["input_ids"]
    assert document.ids.tolist() == ids
    positions = document.labels["position"].tolist()
    assert len(ids) > 2 * len(WORDS)  # words of several tokens
    for count, position in enumerate(positions, start=1):
        assert tokenizer.decode(ids[: position + 1]) == " ".join(WORDS[:count])
    assert [list(encoder.classes)[int(t)] for t in document.labels["target"]] == [
        json.dumps(tag) for tag in tags
    ]
    assert set(document.labels["weight"]) == {1.0}


def test_tags_stand_so_with_tokens_around_the_text(tokenizer, rows) -> None:
    source = rows({"tokens": WORDS, "tags": [1] * len(WORDS)})
    _, (bare,) = encoded(tokenizer, TAGS, source)
    around = deepcopy(tokenizer)
    around.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    _, (document,) = encoded(around, TAGS, source)
    assert document.ids.tolist() == [1, *bare.ids.tolist(), 2]
    assert (document.labels["position"] == bare.labels["position"] + 1).all()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "token 2 is empty"),
    ],
)
def test_tags_that_do_not_fit_are_refused(tokenizer, rows, row, words) -> None:
    good = {"tokens": ["a"], "tags": ["O"]}
    with pytest.raises(UserError, match=rf"rows\.jsonl line 2.*{words}"):
        prepare(tokenizer, TAGS, rows(good, row))


CONTEXT = "Zürich — the city — lies at the Limmat, 408 m above the sea 🎉 level."


def asked(
    *answers: str, start: int | None = None, question: str = "What lies at the Limmat?"
) -> dict:
    starts = [CONTEXT.find(answer) if start is None else start for answer in answers]
    found = {"text": list(answers), "answer_start": starts}
    return {"question": question, "context": CONTEXT, "answers": found}


@pytest.mark.parametrize(
    "answer", ["Zürich", "Limmat", "408 m above the sea 🎉 level", "the city —"]
)
def test_an_answer_is_where_its_characters_are(tokenizer, rows, answer) -> None:
    row = asked(answer)
    _, (document,) = encoded(tokenizer, ANSWERS, rows(row))
    assert document.ids.tolist() == tokenizer(row["question"], CONTEXT)["input_ids"]
    (first, begins, half), (last, ends, _) = labels(document)
    assert (begins, ends, half) == (0, 1, 0.5)
    assert tokenizer.decode(document.ids[first : last + 1]).strip().rstrip(".,") == answer
    assert first >= len(tokenizer(row["question"])["input_ids"])


def test_without_an_answer_the_first_token_says_so(tokenizer, rows) -> None:
    _, (document,) = encoded(tokenizer, ANSWERS, rows(asked()))
    assert labels(document) == [(0, 0, 0.5), (0, 1, 0.5)]


@pytest.mark.parametrize(
    "row",
    [asked("Basel", start=3), asked("Limmat", start=0), asked("", start=0), asked(" ", start=8)],
)
def test_an_answer_that_is_not_there_is_refused(tokenizer, rows, row) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: the answer"):
        prepare(tokenizer, ANSWERS, rows(asked("Limmat"), row))


# --- classes -----------------------------------------------------------------------------------


def labelled(*given: object) -> list[dict]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(given)]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([10, 9, -1, 2], ["-1", "2", "9", "10"]),
        (["b", "a", "Z", "ä", "10", "9"], ["10", "9", "Z", "a", "b", "ä"]),
        ([True, False], ["false", "true"]),
        ([1, True, 0, False], ["0", "false", "1", "true"]),
    ],
)
def test_the_order_of_classes(tokenizer, rows, given, names) -> None:
    found = prepare(tokenizer, CLASSES, rows(*labelled(*given, *given)))
    assert found.classes.names == names
    assert found.classes.counts_C.tolist() == [2] * len(names)
    said = [found.classes.labels[int(d.labels["target"][0])] for d in found.documents]
    assert said == [json.dumps(label) for label in [*given, *given]]


def test_two_classes_that_read_alike_are_refused(tokenizer, rows) -> None:
    with pytest.raises(UserError, match=r"'1'.*as text and as a number"):
        prepare(tokenizer, CLASSES, rows(*labelled(1, "1", 1, "1")))


def test_rows_none_of_which_has_a_class_are_refused(tokenizer, rows) -> None:
    with pytest.raises(UserError, match="no training row has a class"):
        prepare(tokenizer, CLASSES, rows(*labelled([], [], [])))


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_a_label_that_no_training_row_has_is_refused(tokenizer, rows, fraction) -> None:
    """From a file of its own, or held out."""
    train, held = labelled("a", "b", "a", "b"), labelled("b", "new")
    if fraction is None:
        with pytest.raises(UserError, match=r"held\.jsonl line 2 has the label 'new'"):
            prepare(tokenizer, CLASSES, rows(*train), rows(*held, name="held.jsonl"))
        return
    source = rows(*train, *labelled(*"abababab"), *held)
    refused = 0
    for seed in range(8):
        if "new" in {e.target.labels[0] for e in held_of(tokenizer, source, seed)}:
            refused += 1
            with pytest.raises(UserError, match=r"rows\.jsonl line 14 has the label 'new'"):
                prepare(tokenizer, CLASSES, source, fraction=fraction, seed=seed)
        else:
            found = prepare(tokenizer, CLASSES, source, fraction=fraction, seed=seed)
            assert "new" in found.classes.names
    assert 0 < refused < 8


def held_of(tokenizer, source: PlainSource, seed: int) -> list:
    """The rows that half of the rows being held out takes, whatever their labels."""
    folder = StoredRows(preparation(tokenizer, CLASSES)._build([source], ()).folder)
    out = hold_out(folder.table["key"], 0.5, seed)
    return [folder.example(row) for row in np.flatnonzero(out).tolist()]


def test_a_label_of_other_rows_is_refused_when_they_are_measured(tokenizer, rows) -> None:
    found = prepare(tokenizer, CLASSES, rows(*labelled("b", "a", "b", "a")))
    ours = preparation(tokenizer, CLASSES)
    other = ours.read(rows(*labelled("a", "b"), name="other.jsonl"))
    assert [labels(d) for _, d in ours.held_out(other, found.classes)] == [
        [(LAST, 0, 1)],
        [(LAST, 1, 1)],
    ]
    unknown = ours.read(rows(*labelled("a", "c"), name="other.jsonl"))
    with pytest.raises(UserError, match=r"other\.jsonl line 2 has the label 'c'"):
        ours.held_out(unknown, found.classes)


def test_balanced_weights_are_scikit_learns(tokenizer, rows) -> None:
    given = ["a", "c", "b", "b", "c", "c", "a", "c", "c"]
    found = prepare(tokenizer, CLASSES, rows(*labelled(*given)), class_weights="balanced")
    weights = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=given)
    of = dict(zip("abc", weights, strict=True))
    assert [d.labels["weight"][0] for d in found.documents] == pytest.approx([of[g] for g in given])
    held = prepare(
        tokenizer,
        CLASSES,
        rows(*labelled(*given)),
        rows(*labelled("a"), name="h.jsonl"),
        class_weights="balanced",
    )
    assert labels(held.validation_documents[0]) == [(LAST, 0, 1)]  # measured as it is


def test_weights_are_given_by_name(tokenizer, rows) -> None:
    source = rows(*labelled(0, 1, 0, 1))
    found = prepare(tokenizer, CLASSES, source, class_weights={"1": 2.5})
    assert [float(d.labels["weight"][0]) for d in found.documents] == [1, 2.5, 1, 2.5]
    with pytest.raises(UserError, match=r"head\.class_weights: '2' is no class; known are 0, 1"):
        prepare(tokenizer, CLASSES, source, class_weights={"2": 1.0})


def test_rows_of_no_class_weigh_what_they_weigh(tokenizer, rows) -> None:
    source = rows(*labelled(["a"], ["a", "b"], [], ["b"]))
    found = prepare(tokenizer, CLASSES, source, class_weights={"a": 3.0, "b": 5.0})
    assert found.classes.many
    assert [labels(d) for d in found.documents] == [
        [(LAST, 0, 3)],
        [(LAST, 0, 1.5), (LAST, 1, 2.5)],
        [(LAST, NO_CLASS, 1)],
        [(LAST, 1, 5)],
    ]


@pytest.mark.parametrize("first", ["a", ["a"]])
def test_one_and_several_classes_do_not_mix(tokenizer, rows, first) -> None:
    one, other = (first, ["a", "b"]) if first == "a" else (first, "b")
    with pytest.raises(UserError, match=r"rows\.jsonl line 6 gives .* of its classes"):
        prepare(tokenizer, CLASSES, rows(*labelled(*[one] * 5, other)))
    held = rows(*labelled(other), name="held.jsonl")
    with pytest.raises(UserError, match=r"held\.jsonl line 1 gives .* of its classes"):
        prepare(
            tokenizer,
            CLASSES,
            rows(*labelled(one, one, "b" if first == "a" else ["b"])),
            held,
            allow=["rare_class"],
        )


@pytest.mark.parametrize("label", ["7", True, [1, 2], [1.0]])
def test_regression_takes_one_number(tokenizer, rows, label) -> None:
    found = prepare(tokenizer, NUMBER, rows(*labelled(7, -0.5)))
    assert [labels(d) for d in found.documents] == [[(LAST, 7, 1)], [(LAST, -0.5, 1)]]
    assert found.classes is None
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: .*one number"):
        prepare(tokenizer, NUMBER, rows(*labelled(1, label)))


def test_a_number_with_a_fraction_is_no_class(tokenizer, rows) -> None:
    with pytest.raises(UserError, match=r"line 2: the label 0\.5 is no class"):
        prepare(tokenizer, CLASSES, rows(*labelled(1, 0.5)))


# --- what is stored ----------------------------------------------------------------------------


def many_rows(task: str) -> list[dict]:
    """22 rows, whose classes come in another order than the head has them."""
    match task:
        case "sequence_classification":
            return [{"text": f"text {i}", "label": 9 - i % 5, "text_pair": "x"} for i in range(22)]
        case "regression":
            return labelled(*(i / 4 for i in range(22)))
        case "token_classification":
            return [
                {"tokens": WORDS[: 1 + i % 7], "tags": "HGFEDCB"[: 1 + i % 7][::-1]}
                for i in range(22)
            ]
    answers = ["Limmat", "Zürich", None]
    return [
        asked(*[a for a in [answers[i % 3]] if a], question=f"Question {i}?") for i in range(22)
    ]


def spread(row: dict) -> dict:
    return row | {"tags": list(row["tags"])} if "tags" in row else row


def expected_of(tokenizer, task: str, source: PlainSource) -> list[tuple]:
    """What the encoder says, with the classes in the order of the head."""
    encoder, documents = encoded(tokenizer, task, source)
    place = {
        label: i
        for i, label in enumerate(sorted(encoder.classes, key=lambda x: str(json.loads(x))))
    }
    seen = list(encoder.classes)
    return [
        (
            d.where,
            d.ids.tolist(),
            [(p, place[seen[int(t)]] if seen else t, w) for p, t, w in labels(d)],
        )
        for d in documents
    ]


def content(prepared: Prepared) -> list[tuple]:
    return [(d.where, d.ids.tolist(), labels(d)) for d in prepared.documents]


@pytest.mark.parametrize("task", [CLASSES, NUMBER, TAGS, ANSWERS])
@pytest.mark.parametrize("stop_after", [None, 1, 3])
def test_what_is_stored_comes_back(tokenizer, rows, tmp_path, task, stop_after) -> None:
    source = rows(*map(spread, many_rows(task)))
    if stop_after is not None:
        with pytest.raises(StoppedError):
            prepare(tokenizer, task, source, report=stop_at(4 * stop_after))
        (folder,) = [f for f in (tmp_path / "cache" / "prepared").iterdir() if f.is_dir()]
        committed = Writer(folder)
        assert committed.rows < 22
        committed.close()
    found = prepare(tokenizer, task, source)
    assert content(found) == expected_of(tokenizer, task, source)
    assert found.documents.labels_N.tolist() == [len(d.labels) for d in found.documents]
    examples = preparation(tokenizer, task).read(source)
    assert [(e.text, e.target) for e in found.examples] == [(e.text, e.target) for e in examples]


@pytest.mark.parametrize("task", [NUMBER, ANSWERS, TAGS])
def test_measured_rows_stand_beside_their_documents(tokenizer, rows, task) -> None:
    """Also where a long row is dropped, or cut so that its label is gone."""
    content_rows = [spread(row) for row in many_rows(task)[:6]]
    long = {
        NUMBER: {"text": "word " * 90, "label": 3},
        ANSWERS: asked("Limmat", question="word " * 90),
        TAGS: {"tokens": ["word"] * 90, "tags": ["H"] * 90},
    }[task]
    held = rows(content_rows[0], long, content_rows[1], name="held.jsonl")
    policy = {NUMBER: "drop", ANSWERS: "truncate", TAGS: "split"}[task]
    options = {"on_too_long": policy, "max_length_tokens": 60}
    found = prepare(tokenizer, task, rows(*content_rows), held, allow=["rare_class"], **options)
    ours = preparation(tokenizer, task, **options)
    again = ours.held_out(list(found.validation), found.classes)
    documents = found.validation_documents
    assert [e.where for e in documents.examples] == [d.where for d in documents]
    assert [(e.where, d.ids.tolist(), labels(d)) for e, d in again] == [
        (d.where, d.ids.tolist(), labels(d)) for d in documents
    ]
    assert len(documents) == {NUMBER: 2, ANSWERS: 2, TAGS: 4}[task]
    assert len(found.validation) == 3


def test_a_rare_class_blocks_until_it_is_allowed(tokenizer, rows) -> None:
    source = rows(*labelled(["a"], ["b", "a"], [], ["c"]))
    found = finding(prepare(tokenizer, CLASSES, source), "rare_class")
    assert (found.status, found.count) == ("blocking", 2)
    assert [where[-6:] for where in found.examples] == ["line 2", "line 4"]
    allowed = prepare(tokenizer, CLASSES, source, allow=["rare_class"])
    assert finding(allowed, "rare_class").status == "allowed"
    assert not allowed.audit.blocking


def test_a_tag_of_one_row_only_is_rare(tokenizer, rows) -> None:
    """However often the row has it."""
    content_rows = [
        {"tokens": ["a", "b"], "tags": tags} for tags in (["O", "O"], ["B", "B"], ["O", "O"])
    ]
    found = finding(prepare(tokenizer, TAGS, rows(*content_rows)), "rare_class")
    assert (found.status, found.count) == ("blocking", 1)
    assert found.examples[0].endswith("line 2")


@pytest.mark.parametrize(
    ("most", "said"), [("yes", "'yes'"), (["yes", "no"], "'yes, no'"), ([], "'no class'")]
)
def test_an_unbalanced_set_names_its_label(tokenizer, rows, most, said) -> None:
    other = ["rare"] if isinstance(most, list) else "rare"
    found = prepare(tokenizer, CLASSES, rows(*labelled(other, other, *[most] * 58)))
    balance = finding(found, "label_balance")
    assert (balance.status, balance.count) == ("warning", 58)
    assert balance.remedy.endswith(said)


def test_answers_at_different_places_are_balanced(tokenizer, rows) -> None:
    content_rows = [
        asked(["Limmat", "Zürich"][i % 2], question=f"Question {i}?") for i in range(60)
    ]
    assert (
        finding(prepare(tokenizer, ANSWERS, rows(*content_rows)), "label_balance").status
        == "passed"
    )
    unanswered = [asked(question=f"Question {i}?") for i in range(58)]
    found = prepare(tokenizer, ANSWERS, rows(*content_rows[:2], *unanswered, name="none.jsonl"))
    balance = finding(found, "label_balance")
    assert (balance.count, balance.remedy[-11:]) == (58, "'no answer'")


def test_there_are_no_classes_without_rows(tokenizer, rows, tmp_path) -> None:
    prepare(tokenizer, CLASSES, rows(*labelled("a", "b")), allow=["rare_class"])
    (folder,) = [f for f in (tmp_path / "cache" / "prepared").iterdir() if f.is_dir()]
    stored = StoredRows(folder)
    assert find_classes(stored, np.array([1])).names == ["b"]
