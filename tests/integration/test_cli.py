"""The command line as a person uses it: one short run, and everything that follows from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIX_SHORT_STEPS, write_recipe
from safetensors.torch import load_file

from llamaweft.pipeline import write_run_report
from llamaweft.train.run_folder import RunFolder


def llamaweft(*arguments: object, code: int = 0, **options) -> subprocess.CompletedProcess:
    """Run a command and check how it ended. Nobody ever sees a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "llamaweft", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def as_json(*arguments: object, **options):
    return json.loads(llamaweft(*arguments, "--json", **options).stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A finished run of six steps: the folder that holds recipe.yaml, chats.jsonl and run/."""
    folder = tmp_path_factory.mktemp("cli")
    lines = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Question {i}" + " please" * (i % 5)},
                {"role": "assistant", "content": f"Answer {i}" + " indeed" * (i % 3)},
            ]
        }
        for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    tree = {
        "model": str(tiny_folder),
        "data": {"train": "chats.jsonl", "validation": {"fraction": 0.2}},
        "adapter": {"r": 4},
        "base_weights": "fp32",
        "training": SIX_SHORT_STEPS | {"report_to": ["tensorboard"]},
        "evaluation": {
            "every_steps": 3,
            "metrics": ["loss", "exact_match"],
            "max_new_tokens": 4,
            "early_stopping_patience": None,
        },
        "output_dir": "run",
    }
    write_recipe(tree, folder / "recipe.yaml")
    result = as_json("train", "recipe.yaml", cwd=folder)
    assert (result["step"], result["reason"]) == (6, "finished")
    return folder


def test_help_lists_the_verbs_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['llamaweft', '--help']\n"
        "from llamaweft.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "evaluate" in done.stdout
    assert done.stderr.strip() == "False"


def test_help_of_train_shows_the_recipes_keys() -> None:
    text = llamaweft("train", "--help").stdout
    assert "training.micro_batch_tokens" in text
    assert "peak learning rate" in text


def test_the_run_folder_is_complete(run: Path) -> None:
    names = {p.name for p in (run / "run").iterdir()}
    assert names >= {
        "recipe.yaml",
        "environment.json",
        "audit.json",
        "plan.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "evaluation.json",
        "report.md",
        "report.html",
    }
    assert [p.name for p in sorted((run / "run/checkpoints").iterdir())] == [
        "step-000004",
        "step-000006",
    ]
    assert list((run / "run").rglob("events.out.tfevents*")), "tensorboard wrote nothing"


def test_the_runs_own_evaluation_comes_first_in_its_report(run: Path) -> None:
    folder = RunFolder(run / "run")
    beside = json.loads(folder.evaluation.read_text()) | {"name": "something beside it"}
    other = folder.root / "evaluation-beside.json"
    other.write_text(json.dumps(beside))
    try:
        write_run_report(folder)
        report = folder.report_md.read_text()
    finally:
        other.unlink()
        write_run_report(folder)
    assert "beside it" in report
    assert "beside it" not in report[: report.index("##")]  # the first sentence is of the run's own
    assert report.index("held-out rows") < report.index("something beside it")


def test_metrics_are_one_line_a_step(run: Path) -> None:
    records = [json.loads(line) for line in (run / "run/metrics.jsonl").open()]
    train = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [3, 6]
    for record in train:
        assert record["trained_tokens"] < record["tokens"]
        assert record["computed_tokens"] <= min(record["tokens"], 512)
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
        assert min(record[k] for k in ("loss", "lr", "grad_norm", "anon_bytes", "rss_bytes")) > 0
        assert record["useful_flops_per_second"] > 0
    assert train[-1]["loss"] < train[0]["loss"]


def test_evaluation_holds_before_and_after(run: Path) -> None:
    content = json.loads((run / "run/evaluation.json").read_text())
    before, after = (content[side]["metrics"]["loss"] for side in ("before", "after"))
    assert after["value"] < before["value"]
    assert before["low"] < before["value"] < before["high"]
    assert before["count"] == 8
    validations = [json.loads(line) for line in (run / "run/metrics.jsonl").open()]
    best = min(r["loss"] for r in validations if r["kind"] == "validation")
    assert after["value"] == best


def test_evaluate_measures_what_train_measured(run: Path) -> None:
    recorded = json.loads((run / "run/evaluation.json").read_text())
    compared = as_json(
        "evaluate", "run", "--compare", json_model(run), "--metrics", "loss", cwd=run
    )
    for side in ("before", "after"):
        ours, theirs = (c[side]["metrics"]["loss"]["value"] for c in (compared, recorded))
        assert ours == pytest.approx(theirs, rel=1e-5)


def json_model(run: Path) -> str:
    return json.loads((run / "recipe.yaml").read_text())["model"]


def test_evaluate_a_model_on_a_file(run: Path) -> None:
    content = as_json("evaluate", json_model(run), "--data", "chats.jsonl", cwd=run)
    assert content["before"]["metrics"]["loss"]["count"] == 40
    assert content["after"] is None
    llamaweft("evaluate", "run", cwd=run)


def ids_of_a_chat(folder: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Question 3"}, {"role": "assistant", "content": "Answer"}]
    return torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)])


def our_logits(run: Path, ids: torch.Tensor) -> torch.Tensor:
    from llamaweft.data.chat import Document
    from llamaweft.model.pack import Pack
    from llamaweft.subject import open_subject

    opened = open_subject(str(run / "run"))
    opened.model.model.compute_dtype = torch.float32
    document = Document(ids[0].numpy(), np.zeros(ids.shape[1], np.float32), "")
    with torch.no_grad():
        return opened.model(Pack.from_documents([document]))


def test_the_adapter_opens_in_peft(run: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    theirs = AutoPeftModelForCausalLM.from_pretrained(run / "run/adapter", dtype=torch.float32)
    ids = ids_of_a_chat(Path(json_model(run)))
    with torch.no_grad():
        expected = theirs(ids).logits[0]
    assert (our_logits(run, ids) - expected).abs().max() < 1e-4


def test_export_to_hugging_face(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    content = as_json("export", "run", "--to", "hf", "--output", tmp_path / "merged", cwd=run)
    assert content["parity"]["passed"]
    assert content["parity"]["relative_difference"] < 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert theirs.dtype == torch.float32
    ids = ids_of_a_chat(tmp_path / "merged")
    with torch.no_grad():
        assert (our_logits(run, ids) - theirs(ids).logits[0]).abs().max() < 1e-4
    again = llamaweft(
        "export", "run", "--to", "hf", "--output", tmp_path / "merged", cwd=run, code=2
    )
    assert "not empty" in again.stderr


def test_export_to_peft(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    content = as_json("export", "run", "--to", "peft", "--output", output, cwd=run)
    assert content["parity"]["passed"]
    assert (output / "parity.json").exists()
    exported, live = (
        load_file(p / "adapter_model.safetensors") for p in (output, run / "run/adapter")
    )
    assert all(torch.equal(exported[name], live[name]) for name in live)


def test_the_proof_sees_a_changed_adapter(run: Path, tmp_path: Path, monkeypatch) -> None:
    from llamaweft import exports, subject
    from llamaweft.adapters.lora import lora_layers
    from llamaweft.errors import RunError

    def save_another(model, *arguments) -> None:
        layer = next(iter(lora_layers(model).values()))
        layer.lora_B.data.add_(0.01)
        real(model, *arguments)
        layer.lora_B.data.sub_(0.01)

    real = exports.save_adapter
    monkeypatch.setattr(exports, "save_adapter", save_another)
    with pytest.raises(RunError, match="answers differently"):
        subject.export_run(run / "run", "peft", tmp_path / "out")


def test_an_export_that_differs_leaves_nothing(run: Path, tmp_path: Path, monkeypatch) -> None:
    from llamaweft.errors import RunError
    from llamaweft.export import parity
    from llamaweft.subject import export_run

    monkeypatch.setitem(parity.TOLERANCES, "peft", -1.0)
    with pytest.raises(RunError, match="answers differently"):
        export_run(run / "run", "peft", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_chat_answers_one_message_and_several(run: Path) -> None:
    one = as_json("chat", "run", "--message", "Question 3", "--max-new-tokens", 5, cwd=run)
    assert set(one) == {"message", "answer"}
    spoken = llamaweft(
        "chat", "run", "--max-new-tokens", 5, cwd=run, input="Question 3\nAnd?\n/new\nQuestion 3\n"
    )
    lines = spoken.stdout.splitlines()
    assert lines[0] == lines[-1] == one["answer"]
    assert "Be brief." in spoken.stderr  # the run's own system message


def test_data_show_and_audit(run: Path) -> None:
    row = as_json("data", "show", "recipe.yaml", "--rows", 1, cwd=run)[0]
    trained = "".join(t for t, yes in zip(row["tokens"], row["trained"], strict=True) if yes)
    assert trained.startswith("Answer")
    assert trained.endswith("<|im_end|>")
    assert "Question" in llamaweft("data", "show", "recipe.yaml", cwd=run).stdout
    assert as_json("data", "audit", "recipe.yaml", cwd=run)["passed"]


def test_plan_and_doctor(run: Path) -> None:
    plan = as_json("plan", "recipe.yaml", cwd=run)
    assert plan["steps"] == 6
    assert plan["fits"]
    assert plan["peak_bytes"] == sum(plan["parts"].values())
    assert "compute" in plan["decisions"]
    machine = as_json("doctor")
    assert machine["matmul_flops_per_second"]["fp32"] > 1e8
    assert plan["speed"]["measured"]
    assert plan["seconds_per_step"] == pytest.approx(sum(plan["seconds"].values()))
    assert plan["computed_tokens"] < plan["tokens"]  # all rows have one system message
    llamaweft("plan", "recipe.yaml", cwd=run)


def test_plan_for_a_device_that_is_not_here(run: Path) -> None:
    options = ("--device", "t4", "--price-per-hour", 0.35)
    plan = as_json("plan", "recipe.yaml", *options, "base_weights=nf4", cwd=run)
    assert not plan["speed"]["measured"]
    assert "T4" in plan["decisions"]["device"]
    assert plan["decisions"]["compute"].startswith("fp16")
    assert plan["parts"]["weights"] > 0  # on a GPU they take its memory
    assert plan["cost"] == pytest.approx(plan["total_seconds"] / 3600 * 0.35)
    shown = llamaweft("plan", "recipe.yaml", *options, cwd=run).stdout
    assert "not measured" in shown


def test_predict_answers_in_order_and_goes_on_where_it_was_stopped(run: Path) -> None:
    prompts = run / "prompts.jsonl"
    rows = [{"prompt": f"Question {i}" + " please" * (i % 4)} for i in range(5)]
    prompts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = ("predict", "run", prompts, "--max-new-tokens", 3, "--output")
    assert as_json(*command, "all.jsonl", cwd=run)["made_now"] == 5
    answers = (run / "all.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in answers] == [1, 2, 3, 4, 5]
    assert json.loads(answers[3])["messages"] == [
        {"role": "user", **{"content": rows[3]["prompt"]}}
    ]
    llamaweft(*command, "all.jsonl", cwd=run, code=2)

    # As a call leaves it that was killed in the third answer.
    import hashlib

    said = json.dumps([[{"role": "user", "content": row["prompt"]}] for row in rows])
    head = {
        "subject": "run",
        "prompts": hashlib.sha256(said.encode()).hexdigest(),
        "max_new_tokens": 3,
    }
    half = [json.dumps(head), *answers[:2], answers[2][:20]]
    (run / "again.jsonl.unfinished").write_text("\n".join(half), encoding="utf-8")
    assert "--resume" in llamaweft(*command, "again.jsonl", cwd=run, code=2).stderr
    other = ("predict", "run", prompts, "--max-new-tokens", 9, "--resume", "--output")
    assert "other options" in llamaweft(*other, "again.jsonl", cwd=run, code=2).stderr
    assert as_json(*command, "again.jsonl", "--resume", cwd=run)["made_now"] == 3
    assert (run / "again.jsonl").read_text(encoding="utf-8").splitlines() == answers
    assert not (run / "again.jsonl.unfinished").exists()


def test_model_inspect(run: Path) -> None:
    content = as_json("model", "inspect", json_model(run))
    assert content["dtypes"] == ["float32"]
    assert (content["num_attention_heads"], content["num_key_value_heads"]) == (4, 2)


def test_a_used_folder_is_refused(run: Path) -> None:
    done = llamaweft("train", "recipe.yaml", cwd=run, code=2)
    assert "holds another run" in done.stderr


def test_full_fine_tuning(run: Path) -> None:
    tree = json.loads((run / "recipe.yaml").read_text())
    tree |= {"adapter": {"method": "none"}, "base_weights": "auto", "output_dir": "full"}
    tree["training"] |= {"learning_rate": 1e-3, "report_to": []}
    write_recipe(tree, run / "full.yaml")
    result = as_json("train", "full.yaml", cwd=run)
    before, after = (
        result["evaluation"][s]["metrics"]["loss"]["value"] for s in ("before", "after")
    )
    assert after < before
    content = as_json("export", "full", "--to", "hf", "--output", "full-merged", cwd=run)
    assert content["parity"]["passed"]
    refused = llamaweft("export", "full", "--to", "peft", "--output", "x", cwd=run, code=2)
    assert "no adapter" in refused.stderr


def changed(run: Path, name: str, **training) -> Path:
    tree = json.loads((run / "recipe.yaml").read_text())
    tree["output_dir"] = name
    tree["training"] |= {"report_to": [], **training}
    return write_recipe(tree, run / f"{name}.yaml")


def losses(folder: Path) -> list[tuple]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [(r["kind"], r["step"], r["loss"]) for r in records]


def test_a_killed_run_goes_on_bit_for_bit(run: Path) -> None:
    recipe = changed(run, "killed", max_steps=40)
    whole = changed(run, "whole", max_steps=40)
    command = [sys.executable, "-m", "llamaweft", "train", recipe.name]
    process = subprocess.Popen(
        command, cwd=run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(run / "killed/checkpoints/step-000006", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    as_json("train", recipe.name, "--resume", cwd=run)
    as_json("train", whole.name, cwd=run)
    assert losses(run / "killed") == losses(run / "whole")
    for name in (
        "adapter/adapter_model.safetensors",
        "checkpoints/step-000040/trained.safetensors",
    ):
        ours, theirs = (load_file(run / r / name) for r in ("killed", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    sides = [json.loads((run / r / "evaluation.json").read_text()) for r in ("killed", "whole")]
    assert sides[0] == sides[1]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the run has written this far."""
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def test_a_signal_saves_and_says_so(run: Path) -> None:
    recipe = changed(run, "stopped", max_steps=400, checkpoint_every_steps=1000)
    command = [sys.executable, "-m", "llamaweft", "train", recipe.name]
    process = subprocess.Popen(command, cwd=run, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    metrics = run / "stopped/metrics.jsonl"
    wait_for(metrics, process)
    busy = llamaweft("train", recipe.name, "--resume", cwd=run, code=2)
    assert "another process" in busy.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert process.stderr is not None
    assert b"--resume" in process.stderr.read()
    assert len(list((run / "stopped/checkpoints").glob("step-*"))) == 1


def test_resume_with_another_recipe_is_refused(run: Path) -> None:
    done = llamaweft(
        "train", "recipe.yaml", "training.learning_rate=1", "--resume", cwd=run, code=2
    )
    assert "training.learning_rate" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_place_is_refused(run: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    done = llamaweft("train", "recipe.yaml", f"output_dir={tmp_path}/r", cwd=run, code=2)
    assert "cannot be written" in done.stderr
