"""Chats as text, by their chat template, which is not trusted: it is run in a process of its own
(templates/worker.py) within limits of time and memory.

Each chat may take SECONDS of processor time and MEMORY_BYTES, and become ROOM characters and
ROOM_RATIO times what it was. A template that wants more is refused, and the process is begun anew.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 3.0
MEMORY_BYTES = 2**30
ROOM = 2**17
ROOM_RATIO = 8

REQUEST_CHARACTERS = 2**22
"""Chats of so many characters are sent together; they come back as that many texts at once."""

_WORKER = Path(__file__).with_name("worker.py")
_NEEDED = ("PATH", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
"""Of the environment; the rest may hold secrets, and none of it is a template's business."""

Chat = Sequence[dict[str, Any]]


class Written(NamedTuple):
    """A chat as text, and the spans that its template marks as generated."""

    text: str
    marks: list[tuple[int, int]]


class TemplateFailedError(Exception):
    """A template did not render a chat: what it did instead, for a sentence that begins with "the
    chat template". at: the index of the chat."""

    def __init__(self, what: str, at: int = 0) -> None:
        super().__init__(what)
        self.at = at


class TemplateRefusedError(TemplateFailedError):
    """The template itself refused the chat, or is wrong."""


class _EndedError(Exception):
    """The process ended before it answered, at the limit that its text names."""


class Renderer:
    """The process, which is started when it is first needed, and begun anew after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(
        self,
        template: str,
        chats: Sequence[Chat],
        *,
        variables: dict[str, Any],
        tools: Sequence[Any] | None = None,
        prompt: bool = False,
    ) -> list[Written]:
        """Each chat as text. prompt: with the header of an answer at the end. variables: what the
        template finds beside the chat, as the names of control tokens.

        Raises TemplateRefusedError for what a template refuses, TemplateFailedError for one that
        takes more than it may.
        """
        request = {
            "template": template,
            "variables": variables,
            "tools": list(tools) if tools else None,
            "prompt": prompt,
            "seconds": SECONDS,
        }
        common = json.dumps(request, default=str)
        written = [json.dumps(list(chat), default=str) for chat in chats]
        around = 0 if tools is None else len(json.dumps(request["tools"], default=str))
        found: list[Written] = []
        with self._lock:
            for part in _parts(written):
                try:
                    found += self._texts(common, part, around)
                except TemplateFailedError as error:
                    error.at += len(found)
                    raise
        return found

    def _texts(self, common: str, chats: list[str], around: int) -> list[Written]:
        rooms = [ROOM + ROOM_RATIO * (len(chat) + around) for chat in chats]
        line = f'{{"rooms": {rooms}, "chats": [{", ".join(chats)}], {common[1:]}\n'
        try:
            answer = self._ask(line.encode())
        except _EndedError as ended:
            answer = {"limit": str(ended), "at": None}
        if "texts" in answer:
            return [Written(text, [(a, b) for a, b in marks]) for text, marks in answer["texts"]]
        if "error" in answer:
            raise TemplateRefusedError(f"refuses these messages: {answer['error']}", answer["at"])
        if answer["at"] is None and len(chats) > 1:  # which of them it was, is found one by one
            found: list[Written] = []
            for index, chat in enumerate(chats):
                try:
                    found += self._texts(common, [chat], around)
                except TemplateFailedError as error:
                    error.at = index
                    raise
            return found
        raise TemplateFailedError(_over(answer["limit"]), answer["at"] or 0)

    def _ask(self, line: bytes) -> dict[str, Any]:
        """Raises _EndedError when the process ends instead of answering."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = b""
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            if not answer.endswith(b"\n"):
                ended_by = -process.wait()
                raise _EndedError("time" if ended_by == signal.SIGPROF else "memory")
        except BaseException:  # after an interrupt an answer would come to the next question
            self._end()
            raise
        return dict(json.loads(answer))

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _NEEDED if name in os.environ},
            start_new_session=True,  # Ctrl-C is for the command, which ends it
        )
        self._owner = os.getpid()
        return self._process

    def _end(self) -> None:
        """Of a process that was forked from this one, the parent's is left alone."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent is lost with it
                    pipe.close()

    def close(self) -> None:
        """End the process; the next chat begins another."""
        self._end()


@lru_cache(maxsize=1)
def renderer() -> Renderer:
    """The one that this process uses."""
    made = Renderer()
    atexit.register(made.close)
    return made


def _parts(chats: list[str]) -> Iterator[list[str]]:
    """Chats in order, of at most REQUEST_CHARACTERS; a longer one is alone."""
    part: list[str] = []
    held = 0
    for chat in chats:
        if part and held + len(chat) > REQUEST_CHARACTERS:
            yield part
            part, held = [], 0
        part.append(chat)
        held += len(chat)
    if part:
        yield part


def _over(limit: str) -> str:
    if limit == "length":
        return (
            f"writes more than {ROOM:,} characters and {ROOM_RATIO} times what these messages have"
        )
    if limit == "memory":
        return f"takes more than {MEMORY_BYTES >> 20:,} MiB for these messages"
    return f"does not end within {SECONDS:g} seconds for these messages"
