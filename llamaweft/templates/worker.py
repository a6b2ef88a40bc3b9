"""The process that renders chat templates; templates/render.py starts it and talks to it.

A chat template comes with a model, from anybody. It is run in jinja's sandbox, in a process that
the system itself holds to its memory and its processor time, that can write no file and has none of
the secrets of the environment. It imports the standard library and jinja2 only, so that it starts
at once.

A line of JSON in: template, variables, tools, prompt, chats, rooms (the most characters that each
chat may become), seconds (of processor time for each; over it the system ends the process). A line
of JSON out: "texts", each with the spans of its `{% generation %}` marks, or "error" and "at", the
index of the chat.

What a template finds is what transformers' apply_chat_template gives it (its documentation,
"Writing a chat template"); tests/parity/test_chat_templates.py compares the two.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOO_MUCH_MEMORY = "memory"
TOO_LONG = "length"


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the model writes. `within` tells where in the
    text it stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own form)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(generation=self)
        self._blocks: list[str] | None = None
        self._spans: list[tuple[int, int]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Any) -> str:
        text: str = caller()
        if self._blocks is not None:
            start = sum(map(len, self._blocks))
            self._spans.append((start, start + len(text)))
        return text

    @contextmanager
    def within(self, blocks: list[str]) -> Iterator[list[tuple[int, int]]]:
        """blocks: of the text that is being written, filled as it grows. Gives the spans."""
        self._blocks, self._spans = blocks, []
        try:
            yield self._spans
        finally:
            self._blocks = None


class Namespace(jinja2.utils.Namespace):
    """jinja's, without names that lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args  # as jinja does it, so that a template may name an attribute `self`
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a template may not set {name!r}")


class Dictionaries:
    """`dict(...)` and `dict.fromkeys(...)`, and nothing else of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@lru_cache(maxsize=32)
def compiled(template: str) -> jinja2.Template:
    """Raises TemplateError, and whatever Python raises for code that is nested too deeply."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dictionaries(),
        "namespace": Namespace,
    }
    return environment.from_string(template)


class TooLongError(Exception):
    """More text than a chat may become."""


def rendered(request: dict[str, Any], chat: Any, room: int) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat, and its spans. Raises TooLongError, and what a template may raise."""
    template = compiled(request["template"])
    blocks: list[str] = []
    length = 0
    with template.environment.generation.within(blocks) as spans:  # type: ignore[attr-defined]
        for block in template.generate(
            messages=chat,
            tools=request["tools"],
            documents=None,
            add_generation_prompt=request["prompt"],
            **request["variables"],
        ):
            blocks.append(block)
            length += len(block)
            if length > room:
                raise TooLongError
    return "".join(blocks), spans


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """What the process says to a request."""
    texts = []
    for index, (chat, room) in enumerate(zip(request["chats"], request["rooms"], strict=True)):
        try:
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            texts.append(rendered(request, chat, room))
        except TooLongError:
            return {"limit": TOO_LONG, "at": index}
        except MemoryError:
            return {"limit": TOO_MUCH_MEMORY, "at": index}
        except RecursionError:
            return {"error": "it calls itself, or nests, too deeply", "at": index}
        except Exception as error:  # a template may raise whatever Python does
            return {"error": str(error) or type(error).__name__, "at": index}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return {"texts": texts}


def confine(memory_bytes: int) -> None:
    """Limits that hold until the process ends."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def main() -> None:
    confine(int(sys.argv[1]))
    for line in sys.stdin.buffer:
        try:
            answer = json.dumps(answered(json.loads(line)))
        except MemoryError:
            answer = json.dumps({"limit": TOO_MUCH_MEMORY, "at": None})
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
