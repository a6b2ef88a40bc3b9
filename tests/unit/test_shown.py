"""What is shown holds no secret and moves no cursor."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaweft.errors import UserError
from llamaweft.recipe import Recipe
from llamaweft.shown import filled, printable, redacted, secret_in


@pytest.fixture(autouse=True)
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def test_control_characters_become_pictures() -> None:
    assert printable("a\x1b[31mb\x07\r\x7f\x9b\u202e.\n\té🙂") == "a␛[31mb␇␍␡\ufffd\ufffd.\n\té🙂"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:pass-word@host/a.jsonl", "at https://***@host/a.jsonl"),
        ("s3://KEY:SECRET@bucket/x failed", "s3://***@bucket/x failed"),
        ("GET /x?id=7&X-Amz-Signature=abc123&y=1", "GET /x?id=7&X-Amz-Signature=***&y=1"),
        ("/x?X-Amz-Security-Token=a%2Fb&sig=q", "/x?X-Amz-Security-Token=***&sig=***"),
        ("/x?access_token=abc, retry", "/x?access_token=*** retry"),
        ("token hf_abcdefghijklmnopqrst used", "token *** used"),
        ("AKIAIOSFODNN7EXAMPLE is wrong", "*** is wrong"),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        ("rows.jsonl line 3 is not valid", "rows.jsonl line 3 is not valid"),
        ("data.train: monkey=key?", "data.train: monkey=key?"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_values_of_the_environment_are_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_TOKENS_FILE", "/home/me/tokens.txt")
    monkeypatch.setenv("SHORT_SECRET", "true")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/token").write_text("stored-token-of-the-hub\n")
    assert (
        redacted("0123456789abcdef is true, /home/me/tokens.txt")
        == "*** is true, /home/me/tokens.txt"
    )
    assert redacted("with stored-token-of-the-hub") == "with ***"
    assert redacted("with something-given", ["something-given"]) == "with ***"


@pytest.mark.parametrize(
    ("address", "secret"),
    [
        ("https://me:pw@host/a.jsonl", "a password"),
        ("s3://KEY:SECRET@bucket/a.jsonl", "a password"),
        ("https://host/a.jsonl?X-Amz-Signature=abc", "X-Amz-Signature"),
        ("https://host/a.jsonl?id=3&token=abc", "token"),
        ("https://host/a.jsonl?sig=abc", "sig"),
        ("https://host/a.jsonl?key=${MY_KEY}", None),
        ("https://me:${PASSWORD}@host/a.jsonl", None),
        ("https://host/a.jsonl?${QUERY}", None),
        ("https://host/a.jsonl?id=3&page=2", None),
        ("sftp://me@host/a.jsonl", None),
        ("my/chats.jsonl", None),
    ],
)
def test_a_secret_in_an_address_is_found(address: str, secret: str | None) -> None:
    assert secret_in(address) == secret


@pytest.mark.parametrize(
    "key", ["data.train.0.path", "data.validation.path", "data.clean.0.against"]
)
def test_a_recipe_with_a_secret_is_refused_without_showing_it(key: str) -> None:
    tree: dict = {
        "model": "a/b",
        "data": {"train": [{"path": "a.jsonl"}], "validation": {"path": "b.jsonl"}},
    }
    tree["data"]["clean"] = [{"step": "leakage", "against": "c.jsonl"}]
    node, *rest = tree, *key.split(".")
    for part in rest[:-1]:
        node = node[int(part) if part.isdigit() else part]
    node[rest[-1]] = "https://host/rows.jsonl?X-Amz-Signature=planted-secret"
    with pytest.raises(UserError, match=r"\$\{MY_SECRET\}") as refused:
        Recipe.validate_tree(tree)
    assert "planted" not in str(refused.value)
    assert key.rpartition(".")[0] in str(refused.value)


def test_variables_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_QUERY", "sig=abc")
    assert filled("https://h/a?${MY_QUERY}&b=$c") == ("https://h/a?sig=abc&b=$c", ["sig=abc"])
    monkeypatch.delenv("MY_QUERY")
    with pytest.raises(UserError, match=r"the environment variable MY_QUERY, and it is not set"):
        filled("https://h/a?${MY_QUERY}")
