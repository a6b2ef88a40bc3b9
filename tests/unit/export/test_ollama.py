"""Ollama's templates: made from the tokenizer's own, proven on chats, refused where unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaweft.data.template import ChatTemplate
from llamaweft.errors import UserError
from llamaweft.export.go_template import rendered
from llamaweft.export.ollama import CHATS, go_template, write_modelfile
from llamaweft.model.tokenizer import chat_template, load_tokenizer


class Named:
    """What ChatTemplate reads of a tokenizer."""

    def __init__(self, source: str) -> None:
        self.chat_template, self.name_or_path = source, "a/model"
        self.special_tokens_map, self.added_tokens_decoder = {}, {}
        self.all_special_tokens = []

    def get_chat_template(self, tools: object = None) -> str:
        return self.chat_template


def writer(tokenizer):
    template = ChatTemplate(tokenizer)
    return lambda messages: template.render(list(messages), "here", prompt=True)[0]


@pytest.mark.parametrize("name", ["llama3", "llama3.1", "chatml"])
def test_our_own_templates_are_known(name: str) -> None:
    source = chat_template(name)
    write = writer(Named(source))
    begin = None if name == "chatml" else "<|begin_of_text|>"
    template = go_template(write, begin, source, "a/model")
    assert "<|begin_of_text|>" not in template  # Ollama puts it there
    for chat in CHATS:
        assert (begin or "") + rendered(template, chat) == write(chat)


def test_a_begin_token_that_ollama_does_not_put_stays_in_the_template() -> None:
    source = chat_template("llama3")
    assert go_template(writer(Named(source)), None, source, "m").startswith("<|begin_of_text|>")


def test_the_embedded_models_system_message_is_kept() -> None:
    tokenizer = load_tokenizer("builtin:smollm2-135m")
    write = writer(tokenizer)
    template = go_template(write, None, tokenizer.chat_template, "embedded")
    assert "You are a helpful AI assistant named SmolLM" in template
    more = [{"role": "system", "content": "No."}, {"role": "user", "content": "a }} {{ b"}]
    for chat in (*CHATS, more):
        assert rendered(template, chat) == write(chat)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}", "not known here"),
        (
            chat_template("chatml").replace("'<|im_end|>\\n'", "' <|im_end|>\\n'"),
            "not known here",
        ),
        (chat_template("chatml") + "{# strftime_now #}", "the date of the day"),
    ],
)  # fmt: skip
def test_another_template_is_refused(source: str, words: str) -> None:
    with pytest.raises(UserError, match=f"{words}.*--to gguf"):
        go_template(writer(Named(source)), None, source, "a/model")


def test_a_template_that_differs_in_one_chat_alone_is_refused() -> None:
    """It marks turns as ChatML does, but repeats the system message before the last user."""
    source = chat_template("chatml").replace(
        "{%- if add_generation_prompt -%}",
        "{%- if messages | length == 4 -%}{{- 'again' -}}{%- endif -%}"
        "{%- if add_generation_prompt -%}",
    )
    with pytest.raises(UserError, match="not known here"):
        go_template(writer(Named(source)), None, source, "a/model")


def test_a_modelfile(tmp_path: Path) -> None:
    write_modelfile(tmp_path, "m-q8_0.gguf", "a\n{{ .Content }}", ["<|b|>", "<|a|>"], 131072)
    assert (tmp_path / "Modelfile").read_text() == (
        'FROM ./m-q8_0.gguf\nTEMPLATE """a\n{{ .Content }}"""\n'
        'PARAMETER stop "<|a|>"\nPARAMETER stop "<|b|>"\nPARAMETER num_ctx 8192\n'
    )
    write_modelfile(tmp_path, "m.gguf", "a", [], 2048)
    assert "num_ctx 2048" in (tmp_path / "Modelfile").read_text()
    with pytest.raises(UserError, match='holds """'):
        write_modelfile(tmp_path, "m.gguf", 'a"""', [], 2048)
