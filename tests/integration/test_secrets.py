"""Secrets are used and never written down: not in what is said, in a run folder, an export or the
cache. They are planted in every place that they usually have, and everything is searched for them."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import SIX_SHORT_STEPS, write_recipe
from said import all_said

SECRETS = {
    "signature": "planted0signature0of0an0address",
    "hub token": "hf_plantedtokenofthehub",
    "stored hub token": "hf_plantedtokeninafile",
    "wandb key": "planted0key0of0wandb",
    "cloud key": "planted0cloud0key",
    "password": "planted-password-of-netrc",
}


class Closed(BaseHTTPRequestHandler):
    """Serves `rows` to who has the signature, and below /private/ to who has the password. What it
    answers to others repeats what they sent."""

    rows = b""
    served: list[str]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        login = f"me:{SECRETS['password']}".encode()
        told = self.headers["Authorization"] == f"Basic {base64.b64encode(login).decode()}"
        signed = query == f"X-Amz-Signature={SECRETS['signature']}"
        if told if path.startswith("/private/") else signed:
            self.served.append(path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.rows)))
            self.end_headers()
            self.wfile.write(self.rows)
        else:
            self.send_error(403, f"Forbidden with {query}")

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def host(chats: Path) -> Iterator[tuple[type[Closed], str]]:
    handler = type("Served", (Closed,), {"rows": chats.read_bytes(), "served": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The secrets in their places; returns the folder in which they may be."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(SECRETS["stored hub token"])
    (home / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRETS['password']}\n")
    (home / "netrc").chmod(0o600)
    for name, value in {
        "HF_HOME": str(home),
        "HF_TOKEN": SECRETS["hub token"],
        "NETRC": str(home / "netrc"),
        "WANDB_API_KEY": SECRETS["wandb key"],
        "AWS_SECRET_ACCESS_KEY": SECRETS["cloud key"],
        "MY_QUERY": f"X-Amz-Signature={SECRETS['signature']}",
        "LLAMAWEFT_CACHE": str(tmp_path / "cache"),
        "no_proxy": "*",
    }.items():
        monkeypatch.setenv(name, value)
    return home


def assert_nowhere(folder: Path, planted: Path, said: str) -> None:
    """No secret, plain or in base64, in any file of the folder or in what was said."""
    forms = [
        form
        for value in SECRETS.values()
        for form in (value, base64.b64encode(value.encode()).decode()[:-4])
    ]
    for form in forms:
        assert form not in said
    searched = 0
    for path in folder.rglob("*"):
        if path.is_file() and planted not in path.parents:
            content = path.read_bytes()
            searched += 1
            for form in forms:
                assert form.encode() not in content, path
                assert form not in path.name
    assert searched > 10


def test_secrets_are_used_and_nowhere_written(
    host, planted: Path, tiny_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    handler, address = host
    monkeypatch.chdir(tmp_path)
    tree = {
        "model": str(tiny_folder),
        "data": {
            "train": [{"path": f"{address}/rows.jsonl?${{MY_QUERY}}"}],
            "validation": {"path": f"{address}/private/held.jsonl"},
        },
        "audit": {"allow": ["validation_leak"]},
        "adapter": {"r": 2},
        "base_weights": "fp32",
        "training": SIX_SHORT_STEPS
        | {"max_steps": 2, "compute_dtype": "fp32", "report_to": ["tensorboard"]},
        "evaluation": {"every_steps": None, "metrics": ["loss"]},
        "output_dir": "run",
    }
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    said = ""
    for arguments in (
        ("train", recipe),
        ("evaluate", "run"),
        ("export", "run", "--to", "hf", "--output", "exported", "--no-verify"),
        ("data", "audit", recipe, "--html", "audit.html"),
    ):
        code, more = all_said(monkeypatch, capsys, *arguments)
        assert code == 0, more
        said += more
    assert set(handler.served) == {"/rows.jsonl", "/private/held.jsonl"}  # they were needed
    assert "${MY_QUERY}" in (tmp_path / "run/recipe.yaml").read_text()
    assert_nowhere(tmp_path, planted, said)


def test_no_sentence_and_no_traceback_repeats_a_secret(
    host, planted: Path, tiny_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    _, address = host
    monkeypatch.chdir(tmp_path)
    tree = {
        "model": str(tiny_folder),
        "data": {"train": [{"path": "none.jsonl"}]},
        "output_dir": "run",
    }
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    wrong = f"X-Amz-Signature={SECRETS['signature']}0"
    monkeypatch.setenv("WRONG_QUERY", wrong)
    said = ""
    for place in (
        f"{address}/rows.jsonl?${{WRONG_QUERY}}",  # the server repeats it
        f"{address}/rows.jsonl?X-Amz-Signature={SECRETS['signature']}",
        f"http://me:{SECRETS['password']}@127.0.0.1:1/rows.jsonl",
        f"s3://ME:{SECRETS['cloud key']}@bucket/rows.jsonl",
    ):
        code, more = all_said(monkeypatch, capsys, "train", recipe, f"data.train.0.path={place}")
        assert code == 2, more
        said += more
    assert "the server answers 403 Forbidden" in said
    for arguments in (
        ("evaluate", tiny_folder, "--data", f"{address}/a.jsonl?token={SECRETS['signature']}"),
        ("train", recipe, f"data.trian=https://me:{SECRETS['password']}@host"),
        ("train", recipe, f"training.seed=hf_{SECRETS['hub token']}"),
    ):
        code, more = all_said(monkeypatch, capsys, *arguments)
        assert code == 2, more
        said += more

    def broken(*args: object) -> None:
        raise RuntimeError(f"a mistake of ours with {SECRETS['hub token']}")

    monkeypatch.setattr("llamaweft.recipe.Recipe.load", broken)
    code, more = all_said(monkeypatch, capsys, "train", recipe)
    assert (code, "RuntimeError: a mistake of ours with ***" in more) == (1, True)
    said += more
    assert not [form for form in SECRETS.values() if form in said]


def test_a_login_is_not_sent_on_to_another_server(host, planted: Path, tmp_path: Path) -> None:
    """A server that sends its caller elsewhere: the other one must not learn the password."""
    from llamaweft.data.downloads import _request

    request = _request("http://127.0.0.1/private/a.jsonl", {})
    assert request.unredirected_hdrs.keys() == {"Authorization"}
    assert "Authorization" not in request.headers
    assert not _request("http://localhost/a.jsonl", {}).unredirected_hdrs
    filled = _request("http://you:pass%2Fword@localhost:8080/a.jsonl?b=c", {})
    assert filled.full_url == "http://localhost:8080/a.jsonl?b=c"
    login = base64.b64decode(filled.unredirected_hdrs["Authorization"].removeprefix("Basic "))
    assert login == b"you:pass/word"


def test_the_environment_of_a_run_holds_no_variable_that_could_be_a_secret(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamaweft.provenance import provenance

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    said = provenance(recipe_text="", seed=0, commit="", model="m", folder=planted, sources={})
    assert said["variables"]["OMP_NUM_THREADS"] == "1"
    assert "planted" not in json.dumps(said["variables"] | {"command": said["command"]})
