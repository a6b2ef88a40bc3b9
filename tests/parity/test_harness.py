"""lm-evaluation-harness on our engine and on its own Hugging Face model class: the same numbers.

Tolerance: log-probabilities of whole texts are sums of hundreds of fp32 numbers, added in another
order, so 1e-5 of their size; what is counted is equal.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llamaweft.evaluate import harness, harness_tasks
from llamaweft.evaluate.harness import HarnessModel
from llamaweft.evaluate.harness_tasks import TaskOptions, load_tasks, run_tasks
from llamaweft.harness_run import as_harness_model
from llamaweft.model.llama import LlamaForCausalLM
from llamaweft.recipe import Recipe
from llamaweft.subject import open_subject

TASKS = Path(__file__).parents[1] / "harness_tasks"
WORDS = [
    "alpha",
    "beta",
    "the",
    "fine",
    "bridge",
    "river",
    "Paris",
    "cold",
    "warm",
    "Lima",
    "12",
    "blue",
]
CONTEXT_TOKENS = 96
"""Of the model here, so that prompts are cut and texts take several windows."""


def task_row(seed: int) -> dict:
    """A question with choices of one, two and several words, and a text."""
    draw = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    choices = [words(1), words(2), words(draw.randint(1, 6))]
    question, text = words(draw.randint(3, 40)), words(draw.randint(5, 150))
    return {"question": question, "choices": choices, "answer": seed % 3, "text": text}


def write_task_rows(folder: Path, count: int = 12) -> None:
    """What the tasks of tests/harness_tasks read."""
    for name, first, rows in (("rows", 0, count), ("shots", 100, 6)):
        lines = [json.dumps(task_row(seed)) for seed in range(first, first + rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Path]:
    """The tiny model with a short context; the working folder holds the tasks' rows."""
    folder = tmp_path_factory.mktemp("harness")
    shutil.copytree(tiny_folder, folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    config["max_position_embeddings"] = CONTEXT_TOKENS
    (folder / "model/config.json").write_text(json.dumps(config))
    write_task_rows(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_only = partial(TaskManager, include_defaults=False)  # thousands of others take seconds
        patch.setattr(harness_tasks, "TaskManager", own_only)
        yield folder / "model"


@pytest.fixture(scope="module")
def ours(folder: Path) -> HarnessModel:
    tree = {"model": str(folder), "data": {"train": "rows.jsonl"}, "base_weights": "fp32"}
    tree["training"] = {"device": "cpu", "compute_dtype": "fp32"}
    opened = open_subject(str(folder), Recipe.validate_tree(tree))
    return as_harness_model(opened, False, lambda done, total: None)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


@pytest.mark.parametrize("chat", [False, True])
def test_tasks_give_the_numbers_of_the_harness_own_model_class(
    ours: HarnessModel, theirs: HFLM, chat: bool
) -> None:
    names = ["tiny_choice", "tiny_rolling", "tiny_answers"]
    names = [name for name in names if not chat or name != "tiny_rolling"]
    own = TaskOptions(names, limit=9, num_fewshot=2, include_path=TASKS, apply_chat_template=chat)
    found = run_tasks(ours, tasks := load_tasks(own), own)
    expected = simple_evaluate(
        model=theirs,
        tasks=names,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        num_fewshot=2,
        limit=9,
        bootstrap_iters=0,
        apply_chat_template=chat,
    )
    for name, measured in found["metrics"].items():
        task, metric = name.split(" ")
        value = expected["results"][task][f"{metric},none"]
        assert measured["value"] == pytest.approx(value, rel=1e-5), name
        assert measured["low"] <= measured["value"] <= measured["high"]
        assert measured["count"] == 9
    assert len(found["metrics"]) == (3 if chat else 6)
    for name in names:
        samples = expected["samples"][name]
        _same_responses(tasks["tasks"][name].instances, samples)
        assert found["tasks"][name]["version"] == expected["versions"][name]
        if name == "tiny_choice":
            for answer, sample in zip(found["answers"], samples, strict=False):
                scores = [response[0][0] for response in sample["resps"]]
                likeliest = sample["arguments"][scores.index(max(scores))][1]
                assert answer["answer"] == likeliest.strip()
                assert answer["reference"] == sample["doc"]["choices"][sample["target"]]
        shots = 2 if name == "tiny_choice" else 0
        assert found["tasks"][name]["num_fewshot"] in (shots, 2)


def _same_responses(instances: list[Instance], samples: list[dict]) -> None:
    """Every response to every request, and the request itself."""
    theirs = [
        (arguments, response)
        for sample in samples
        for arguments, response in zip(sample["arguments"], sample["resps"], strict=True)
    ]
    assert len(theirs) == len(instances) > 0
    for instance, (arguments, response) in zip(instances, theirs, strict=True):
        assert instance.args == arguments
        (ours,), (expected,) = instance.resps, response
        if isinstance(expected, tuple):
            assert ours[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
            assert ours[1] == expected[1]
        elif isinstance(expected, float):
            assert ours == pytest.approx(expected, rel=1e-5)
        else:
            assert ours == expected


def _requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(kind, {}, given, index, ("task", index, 1))
        for index, given in enumerate(arguments)
    ]


def test_continuations_of_every_kind(ours: HarnessModel, theirs: HFLM) -> None:
    prompt = "The river is"
    (likeliest,) = theirs.generate_until(
        _requests("generate_until", (prompt, {"until": [], "max_gen_toks": 4}))
    )
    end = theirs.tokenizer.eos_token
    requests = _requests(
        "loglikelihood",
        (prompt, likeliest),  # what greedy decoding says
        (prompt, " cold"),
        (prompt, " warm"),
        (prompt + "  ", "cold"),  # spaces that belong to the continuation
        ("", "Paris is fine"),  # nothing before it
        (end + prompt, " blue"),  # what stands before a text is there already
        (" ".join(WORDS * 20), " and so on"),  # longer than the context
        ("x", " " + " ".join(WORDS * 5)[:200]),
    )
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    for (ours_, greedy), (theirs_, is_greedy) in zip(found, expected, strict=True):
        assert ours_ == pytest.approx(theirs_, rel=1e-5, abs=1e-5)
        assert greedy == is_greedy
    assert [greedy for _, greedy in found] == [True] + [False] * 7


def test_answers_end_where_theirs_do(
    ours: HarnessModel, theirs: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated, made = [], harness.generate_batch

    def watched(*given, **options):
        answers = made(*given, **options)
        generated.extend(answers)
        return answers

    monkeypatch.setattr(harness, "generate_batch", watched)
    free = {"until": [], "max_gen_toks": 12}
    prompts = ["The river is", "Paris, Lima", " ".join(WORDS * 20)]
    requests = _requests("generate_until", *((prompt, free) for prompt in prompts))
    plain = ours.generate_until(requests)
    assert plain == theirs.generate_until(requests)
    inside, *across = (theirs.tok_decode(answer.ids[4:6]) for answer in generated)
    stops = [inside[1:3], *across]
    generated.clear()
    requests = _requests(
        "generate_until",
        *((prompt, {"until": stops, "max_gen_toks": 12}) for prompt in prompts),
        *(
            (prompt, {"until": stop, "max_gen_toks": 7})
            for prompt, stop in zip(prompts, stops, strict=True)
        ),
    )
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests)
    for answer in generated[:3]:  # no token is made after what ends the answer
        *before, _ = answer.ids
        assert not any(stop in theirs.tok_decode(before) for stop in stops)
        assert answer.finish == "stop"
    assert all(len(short) < len(text) for short, text in zip(found[:3], plain, strict=True))


def test_what_begins_alike_is_computed_once(
    ours: HarnessModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, hidden = [], LlamaForCausalLM.hidden

    def counting(model, pack):
        computed.append(pack.tokens)
        return hidden(model, pack)

    monkeypatch.setattr(LlamaForCausalLM, "hidden", counting)
    context = " ".join(WORDS * 3)
    choices = [(context, f" {word}") for word in ("cold", "warm", "fine", "blue")]
    tokens = len(ours.tok_encode(context))
    ours.loglikelihood(_requests("loglikelihood", *choices))
    assert computed == [tokens]  # their one token is read by nobody
    computed.clear()
    ours.loglikelihood(_requests("loglikelihood", *((c, f"{word} fine") for c, word in choices)))
    assert tokens < sum(computed) <= tokens + 4 * 8


@pytest.mark.parametrize("said", ["The answer is", " spaces \n", "twice twice", ""])
def test_a_message_that_goes_on_is_written_as_transformers_writes_it(
    ours: HarnessModel, said: str
) -> None:
    for before in ([], [{"role": "system", "content": "Be brief."}]):
        chat = [
            *before,
            {"role": "user", "content": "twice The answer is"},
            {"role": "assistant", "content": said},
        ]
        expected = ours.tokenizer.apply_chat_template(
            chat, tokenize=False, continue_final_message=True
        )
        assert ours.apply_chat_template(chat, add_generation_prompt=False) == expected
