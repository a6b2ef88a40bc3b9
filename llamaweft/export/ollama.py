"""A folder for Ollama: the GGUF and a Modelfile with template, stop words and length.

The TEMPLATE is in Go's template language. It is made from what the tokenizer's own chat template
writes for small chats, for the two ways of marking a turn that are known, and then proven: what it
makes of CHATS must be what the tokenizer's template makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaweft.errors import UserError
from llamaweft.export.go_template import rendered

Messages = Sequence[dict[str, str]]
Render = Callable[[Messages], str]
"""A chat as the tokenizer's template writes it, up to the next answer."""

CONTEXT_TOKENS = 8192
"""What Ollama may keep of a chat, where the model could hold more: it takes the memory at once."""


@dataclass(frozen=True)
class Turn:
    """What stands before and after the role, and after the content."""

    before: str
    after_role: str
    after: str

    def said(self, role: str, content: str) -> str:
        return f"{self.before}{role}{self.after_role}{content}{self.after}"

    @property
    def open(self) -> str:
        """The header of an answer."""
        return f"{self.before}assistant{self.after_role}"


TURNS = {
    "llama3": Turn("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    "chatml": Turn("<|im_start|>", "\n", "<|im_end|>\n"),
}
"""The families that are known."""


def _chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


CHATS = (
    _chat("Hello."),
    _chat("Hello.", system="Be brief."),
    _chat("What is 12 + 30?", "42.", "And in words?"),
    _chat("What is 12 + 30?", "42.", "And in words?", system="Be brief.\nAnd kind."),
    _chat("héllo\n\n  two lines", "{'a': [1]}", "{{ .Role }}?"),
)
"""Chats that a template must write alike."""


def go_template(render: Render, begin: str | None, source: str, name: str) -> str:
    """Ollama's TEMPLATE for a chat template. render: what that writes. begin: the begin token,
    which Ollama puts there itself; None where it does not. source: its text. name: of the
    tokenizer.

    Raises UserError for a template that is of no known family, and for one that writes the date.
    """
    if "strftime_now" in source:
        raise UserError(
            f"the chat template of {name} writes the date of the day, which a Modelfile cannot; "
            "give data.chat_template another when you train, or export --to gguf"
        )

    def bare(messages: Messages) -> str:
        text = render(messages)
        return text.removeprefix(begin) if begin is not None else text

    for turn in TURNS.values():
        template = _made(turn, bare)
        if template is not None and all(rendered(template, c) == bare(c) for c in CHATS):
            return template
    raise UserError(
        f"the chat template of {name} marks turns in a way that is not known here "
        f"({', '.join(TURNS)} are); export --to gguf and write the Modelfile yourself"
    )


def _made(turn: Turn, bare: Render) -> str | None:
    """The template of a family; None where the tokenizer's is of another.

    Two things may differ within a family: what stands before a system message that is given
    (Llama 3.1's dates), and the whole one where none is.
    """
    marker = "\ue000"
    given, without = bare(_chat("u", system=marker)), bare(_chat("u"))
    head, opening = turn.said("user", "u") + turn.open, turn.before + "system" + turn.after_role
    first, opened, rest = given.partition(opening)
    if not (opened and marker in rest and without.startswith(first) and without.endswith(head)):
        return None
    preface = rest[: rest.index(marker)]
    default = without.removeprefix(first).removesuffix(head)
    parts = [_plain(first), "{{ range $i, $_ := .Messages }}"]
    if default:
        parts.append('{{ if and (eq $i 0) (ne .Role "system") }}' + _plain(default) + "{{ end }}")
    parts += [turn.before, "{{ .Role }}", turn.after_role]
    if preface:
        parts.append('{{ if and (eq $i 0) (eq .Role "system") }}' + _plain(preface) + "{{ end }}")
    parts += ["{{ .Content }}", turn.after, "{{ end }}", turn.open]
    return "".join(parts)


def _plain(text: str) -> str:
    """Text that a template holds as it is."""
    return text.replace("{{", '{{ "{{" }}')


def write_modelfile(
    folder: Path, gguf: str, template: str, stops: Iterable[str], context_tokens: int
) -> None:
    """Write `Modelfile` beside the GGUF. stops: texts that end an answer. context_tokens: of the
    model. Raises UserError for text that a Modelfile cannot hold."""
    if '"""' in template:
        raise UserError('the chat template holds """, which ends a TEMPLATE; export --to gguf')
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in sorted(stops)]
    lines.append(f"PARAMETER num_ctx {min(context_tokens, CONTEXT_TOKENS)}")
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def stop_texts(tokenizer: Any, stop_ids: Iterable[int]) -> list[str]:
    """Tokens that end an answer, as they are written."""
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stop_ids)]
