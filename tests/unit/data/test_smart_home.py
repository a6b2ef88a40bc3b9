"""The smart-home data set: splits that do not leak, rows that Home Assistant's recogniser agrees
with, the same bytes everywhere, and a cache that is complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from importlib import metadata, resources

import pytest

from llamaweft.data import smart_home
from llamaweft.data.smart_home_lists import DEVICES, FLOOR_OF
from llamaweft.errors import UserError

SMALL = smart_home.Plan(train=3, validation=2, random=1, draws=10)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("LLAMAWEFT_CACHE")
    os.environ["LLAMAWEFT_CACHE"] = str(folder)
    yield folder
    os.environ.pop("LLAMAWEFT_CACHE")
    if before is not None:
        os.environ["LLAMAWEFT_CACHE"] = before


@pytest.fixture(scope="session")
def built(cache):
    """The full data set, built once: split -> samples with their templates."""
    kept = {}
    build = smart_home._build

    def spy(plan):
        kept.update(build(plan))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smart_home, "_build", spy)
        smart_home.path("train")
    return kept


def sentence(row):
    return row["messages"][1]["content"]


def answer(row):
    return json.loads(row["messages"][2]["content"])


@pytest.fixture
def home_assistant():
    """hassil as Home Assistant uses it, set up here from the packages alone."""
    from hassil import recognize_best
    from hassil.intents import Intents, TextSlotList

    source = resources.files("home_assistant_intents") / "data" / "en.json"
    intents = Intents.from_dict(json.loads(source.read_text(encoding="utf-8")))
    names = [(n, n, {"domain": domain}) for domain, ns in DEVICES.items() for n in ns]
    lists = {
        "name": TextSlotList.from_tuples(names),
        "area": TextSlotList.from_strings(FLOOR_OF),
        "floor": TextSlotList.from_strings(sorted(set(FLOOR_OF.values()))),
    }

    def recognise(text):
        best = recognize_best(
            text,
            intents,
            slot_lists=lists,
            intent_context={"area": "@asking"},
            best_slot_name="name",
        )
        slots = {e.name: e.value for e in best.entities_list if e.value != "@asking"}
        return {"intent": best.intent.name, "slots": slots}

    return recognise


def test_sizes_and_shape_of_rows(built):
    sizes = {split: len(smart_home.rows(split)) for split in smart_home.SPLITS}
    assert 1600 <= sizes["train"] <= 2400
    assert 150 <= sizes["validation"] <= 250
    assert 100 <= sizes["random"] <= 200
    for split in smart_home.SPLITS:
        for row in smart_home.rows(split):
            assert list(row) == ["messages"]
            assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
            assert row["messages"][0]["content"] == smart_home.SYSTEM
            assert list(answer(row)) == ["intent", "slots"]
            assert list(answer(row)["slots"]) == sorted(answer(row)["slots"])
    assert len(smart_home.SYSTEM.split()) <= 12


def test_no_validation_sentence_shares_a_template_with_training(built):
    trained = {key for s in built["train"] + built["random"] for key in s.parents}
    held_out = {key for s in built["validation"] for key in s.parents}
    assert held_out
    assert trained.isdisjoint(held_out)


def test_random_is_made_of_templates_that_training_has(built):
    trained = {s.parents[0] for s in built["train"]}
    assert {s.parents[0] for s in built["random"]} <= trained


def test_intents_with_few_templates_are_for_training_only(built):
    templates = smart_home.Grammar().templates()
    few = {intent for intent, found in templates.items() if len(found) < 4}
    assert few
    assert few <= {s.intent for s in built["train"]}
    assert few.isdisjoint(s.intent for s in built["validation"])
    assert {s.intent for s in built["validation"]} <= {s.intent for s in built["train"]}


def test_no_sentence_is_there_twice(built):
    texts = [
        " ".join(sentence(row).casefold().split())
        for split in smart_home.SPLITS
        for row in smart_home.rows(split)
    ]
    assert len(texts) == len(set(texts))


def test_no_intent_dominates(built):
    for split in smart_home.SPLITS:
        found = smart_home.rows(split)
        counts = Counter(answer(row)["intent"] for row in found)
        assert max(counts.values()) <= 0.05 * len(found)
        assert len(counts) >= 25
    assert set(smart_home.Grammar().templates()) == {s.intent for s in built["train"]}


def test_home_assistant_reads_each_sentence_as_its_answer(built, home_assistant):
    for split in smart_home.SPLITS:
        for row in smart_home.rows(split)[:50]:
            assert home_assistant(sentence(row)) == answer(row)


def test_a_sentence_that_is_read_otherwise_is_refused(home_assistant):
    text, slots = "every fan off", {"domain": "fan", "state": "off"}
    assert home_assistant(text) == {"intent": "HassTurnOff", "slots": {"domain": "fan"}}
    key = ("HassGetState", "<are_all> fan[s] {on_off_states:state}")
    grammar = smart_home.Grammar()
    assert grammar._readings(text, "HassGetState", slots) == []
    template = next(t for t in grammar.templates()["HassGetState"] if t.key == key)
    drawn = [grammar.sample(template, random.Random(seed)) for seed in range(400)]
    sentences = {sample.sentence for sample in drawn if sample}
    assert sentences
    assert text not in sentences
    assert all(home_assistant(s)["intent"] == "HassGetState" for s in sentences)


def test_sentences_read_as_people_speak(built):
    for split in smart_home.SPLITS:
        for row in smart_home.rows(split):
            text = sentence(row)
            assert text == " ".join(text.split())
            assert not set(text) & set("[](){}<>|:;_")
            assert not re.search(r"\b(the the|my the|1 hours|2-hours|for 2 hour|are light)\b", text)
            for value in answer(row)["slots"].values():
                assert not (isinstance(value, float) and value.is_integer())


def test_named_devices_stand_where_the_sentence_says(built):
    area_of = {name: area for names in DEVICES.values() for name, area in names.items()}
    placed = [
        s
        for s in built["train"]
        if "area" in s.slots and area_of.get(s.slots.get("name")) is not None
    ]
    assert len(placed) > 10
    assert all(area_of[s.slots["name"]] == s.slots["area"] for s in placed)


def test_the_same_bytes_whatever_the_hash_seed():
    program = (
        "import hashlib, json\n"
        "from llamaweft.data import smart_home\n"
        f"built = smart_home._build(smart_home.{SMALL!r})\n"
        "rows = {s: [smart_home._row(x) for x in built[s]] for s in built}\n"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())\n"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert digests[0] == digests[1]
    rows = {s: [smart_home._row(x) for x in found] for s, found in smart_home._build(SMALL).items()}
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == digests[0]


def test_a_second_call_reads_the_files(built, cache, monkeypatch):
    def never(plan):
        raise AssertionError("built again")

    monkeypatch.setattr(smart_home, "_build", never)
    file = smart_home.path("validation")
    assert file.is_relative_to(cache / "smart-home")
    assert metadata.version("home-assistant-intents") in file.parent.name
    assert len(smart_home.rows("validation")) == len(file.read_text().splitlines())


def test_another_builder_has_another_folder(built, monkeypatch, tmp_path):
    before = smart_home._fingerprint()
    (tmp_path / "smart_home.py").write_text("changed")
    monkeypatch.setattr(smart_home, "__file__", str(tmp_path / "smart_home.py"))
    assert smart_home._fingerprint() != before


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMAWEFT_CACHE", str(tmp_path))
    row = smart_home._row

    def interrupted(sample):
        interrupted.calls += 1
        if interrupted.calls == 40:
            raise KeyboardInterrupt
        return row(sample)

    interrupted.calls = 0
    monkeypatch.setattr(smart_home, "_row", interrupted)
    monkeypatch.setattr(smart_home, "Plan", lambda: SMALL)
    with pytest.raises(KeyboardInterrupt):
        smart_home.path("train")
    assert list((tmp_path / "smart-home").iterdir()) == []
    monkeypatch.setattr(smart_home, "_row", row)
    assert smart_home.path("train").is_file()
    assert len(list((tmp_path / "smart-home").iterdir())) == 1


def test_the_loser_of_a_race_takes_the_winners_files(tmp_path):
    folder = tmp_path / "smart-home" / "set"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("the winner's\n")
    smart_home._write(folder, SMALL)
    assert [p.name for p in folder.parent.iterdir()] == ["set"]
    assert (folder / "train.jsonl").read_text() == "the winner's\n"


def test_unknown_split(cache):
    with pytest.raises(UserError, match=r"no split 'test': choose one of train, validation"):
        smart_home.rows("test")


@pytest.mark.parametrize("package", ["home-assistant-intents", "hassil"])
def test_missing_package(package, cache, monkeypatch):
    version = metadata.version

    def absent(name):
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(UserError, match=rf"{package}.*pip install 'llamaweft\[demo\]'"):
        smart_home.path("train")
