"""Chat templates within their limits: nothing leads out of the sandbox, nothing runs on, and what
was rendered before a template failed is named right."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from llamaweft.data.chat import Encoder
from llamaweft.data.example import Example
from llamaweft.errors import UserError
from llamaweft.templates import render as render_module
from llamaweft.templates.render import (
    Renderer,
    TemplateFailedError,
    TemplateRefusedError,
    renderer,
)

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "Hi"}]


def rendered(template: str, **changes) -> str:
    (written,) = renderer().render(template, [CHAT], variables={"bos_token": "<s>"}, **changes)
    return written.text


def test_a_template_sees_messages_variables_tools_and_the_prompt() -> None:
    assert rendered("{{ bos_token }}{{ messages[0].content }}") == "<s>Hi"
    assert rendered("{{ add_generation_prompt }} {{ tools }}") == "False None"
    tools = [{"name": "é\n"}]
    assert rendered(
        "{{ add_generation_prompt }} {{ tools | tojson }}", tools=tools, prompt=True
    ) == ('True [{"name": "é\\n"}]')
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert rendered(loop) == "01"
    assert (
        rendered("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ dict(a=1).a }}")
        == "21"
    )
    assert rendered("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_marks_are_told_by_their_place_in_the_text() -> None:
    template = (
        "a{% for m in messages %}é{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}b"
    )
    written = renderer().render(template, [CHAT, [*CHAT, *CHAT]], variables={})
    assert [(one.text, one.marks) for one in written] == [
        ("aéHi!b", [(2, 5)]),
        ("aéHi!éHi!b", [(2, 5), (6, 9)]),
    ]


LEADING_OUT = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ (messages|attr('__class__')) }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.__html__ = 1 %}ok",
    "{{ messages.append(1) }}{{ messages|length }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", LEADING_OUT)
def test_nothing_leads_out_of_the_sandbox(template: str) -> None:
    try:
        text = rendered(template)
    except TemplateRefusedError:
        return
    assert text in ("", "<built-in>"), text  # what may not be seen is nothing


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
FOLDED = (
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}"
)
TOO_MUCH = {
    "endless": (ENDLESS, "does not end within 0.5 seconds"),
    "power": ("{{ 10 ** (10 ** 10) }}", "does not end within|takes more than"),
    "repeated": ("{{ 'a' * 10 ** 11 }}", "takes more than 1,024 MiB"),
    "never written": ("{{ ('a' * 2 ** 31) | length }}", "takes more than 1,024 MiB"),
    "format": ("{{ '%099999999999d' % 1 }}", "takes more than|refuses"),
    "centred": ("{{ 'a' | center(10 ** 11) }}", "takes more than 1,024 MiB"),
    "adjusted": ("{{ 'a'.ljust(10 ** 11) }}", "takes more than 1,024 MiB"),
    "bytes": ("{{ (1).to_bytes(10 ** 11, 'big') }}", "takes more than 1,024 MiB"),
    "doubling": (DOUBLING, "takes more than|does not end within"),
    "folded": (FOLDED, "takes more than|does not end within"),
    "filler": ("{{ lipsum(n=9999999) }}", "takes more than|does not end within"),
    "range": ("{{ range(10 ** 9) | list }}", "refuses these messages: Range too big"),
    "calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "too deeply"),
    "nested": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "refuses|takes more than"),
    "writes": (
        "{% for i in range(99999) %}aaaa{% endfor %}",
        "writes more than 131,072 characters",
    ),
}


@pytest.mark.parametrize(("template", "words"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_takes_too_much_is_one_sentence(
    template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_module, "SECONDS", 0.5)
    rendered(PLAIN)
    before, began = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(TemplateFailedError, match=words):
        rendered(template)
    assert time.monotonic() - began < 10
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    assert rendered(PLAIN) == "user: Hi\n"  # the next one is rendered as ever


@pytest.mark.parametrize(
    "template", [ENDLESS, "{{ 'a' * 10 ** 11 }}", "{{ raise_exception('no') }}"]
)
def test_the_chat_that_fails_is_named(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_module, "SECONDS", 0.3)
    chats = [[{"role": "user", "content": f"{n}"}] for n in range(5)]
    template = f"{{% if messages[0].content == '3' %}}{template}{{% endif %}}ok"
    for characters in (10, 2**22):  # each alone, and all together
        monkeypatch.setattr(render_module, "REQUEST_CHARACTERS", characters)
        with pytest.raises(TemplateFailedError) as failed:
            renderer().render(template, chats, variables={})
        assert failed.value.at == 3


def test_a_row_on_which_a_template_runs_on_is_named(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(render_module, "SECONDS", 0.3)
    own = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m.content * (10 ** 11 if m.content == 'bomb' else 1) }}{% endfor %}"
    try:
        rows = [
            Example(f"f line {n}", ({"role": "user", "content": said},))
            for n, said in enumerate(["a", "bomb", "b"], start=1)
        ]
        with pytest.raises(UserError, match=r"^f line 2: the chat template takes more than"):
            Encoder(tokenizer)(rows)
    finally:
        tokenizer.chat_template = own


def test_parts_of_a_batch_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [[{"role": "user", "content": "x" * n}] for n in range(50)]
    whole = renderer().render(PLAIN, chats, variables={})
    monkeypatch.setattr(render_module, "REQUEST_CHARACTERS", 100)
    assert renderer().render(PLAIN, chats, variables={}) == whole
    assert renderer().render(PLAIN, [], variables={}) == []


def test_a_long_chat_may_become_long() -> None:
    chat = [{"role": "user", "content": "x" * 2**20}]
    (written,) = renderer().render(PLAIN * 3, [chat], variables={})
    assert len(written.text) > 3 * 2**20


def test_the_process_has_no_secret_and_can_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token_of_the_test")
    made = Renderer()
    made.render(PLAIN, [CHAT], variables={})
    process = made._process.pid
    assert b"planted" not in Path(f"/proc/{process}/environ").read_bytes()
    lines = Path(f"/proc/{process}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[0] for line in lines}
    assert limits["Max file size"] == "0"
    assert limits["Max address space"] == str(2**30)
    made.close()
    assert not psutil.pid_exists(process)


class Interrupted:
    """A pipe whose reader is interrupted."""

    def readline(self) -> bytes:
        raise KeyboardInterrupt

    def close(self) -> None:
        return


def test_after_an_interrupt_no_answer_is_taken_for_another() -> None:
    made = Renderer()
    made.render(PLAIN, [CHAT], variables={})
    made._process.stdout, kept = Interrupted(), made._process.stdout
    with pytest.raises(KeyboardInterrupt):
        made.render(PLAIN, [CHAT], variables={})
    kept.close()
    other = [{"role": "user", "content": "other"}]
    assert made.render(PLAIN, [other], variables={})[0].text == "user: other\n"
    made.close()


def test_a_template_that_came_with_a_model_is_held_to_its_limits(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamaweft.model.tokenizer import load_tokenizer

    monkeypatch.setattr(render_module, "SECONDS", 0.3)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tiny_folder / file).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(ENDLESS)
    with pytest.raises(UserError, match=r"fails on the simplest chat: it does not end within"):
        Encoder(load_tokenizer(tmp_path)).template  # noqa: B018 (building it is what is tested)


def test_no_other_way_of_rendering_is_used() -> None:
    package = Path(render_module.__file__).parents[1]
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "render_jinja_template" not in text, path
        assert ".apply_chat_template(" not in text, path
