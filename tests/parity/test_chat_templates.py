"""Which tokens are trained: as trl's templates mark them, and as Meta's ChatFormat writes them."""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from jinja2.exceptions import TemplateError, UndefinedError
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer

from llamaweft.data.chat import Document, Encoder
from llamaweft.data.example import Example
from llamaweft.errors import UserError
from llamaweft.model.tokenizer import load_tokenizer, set_chat_template
from llamaweft.templates.render import TemplateRefusedError, renderer

TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"
MARKED = sorted(path.stem for path in TEMPLATES.glob("*_training.jinja"))
NEEDS_AN_IMAGE = {"llava_next_training"}

CONTROL = re.compile(
    r"<[|\uff5c][^|\uff5c>]{1,40}[|\uff5c]>|<\w+\|>|<\|\w+>|<(?:start|end)_of_\w+>|</?s>|\[/?INST\]"
)
CHATS = [
    [("user", "Hi"), ("assistant", "Hello, you!")],
    [("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", "b")],
    [
        ("system", "Be brief."),
        ("user", "Name a city. "),
        ("assistant", " Rome\n"),
        ("user", "Another?\n\n"),
        ("assistant", "Köln 🦙."),
    ],
    [("user", "Köln?"), ("assistant", "\n\n"), ("user", "?"), ("assistant", "Köln? Köln!")],
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CALLING = (
    {"role": "user", "content": "Is it warm in Köln?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"celsius": 9}', "name": "weather"},
    {"role": "assistant", "content": "No, 9 degrees."},
)


def examples() -> list[Example]:
    chats = [tuple({"role": role, "content": content} for role, content in chat) for chat in CHATS]
    return [*(Example("a row", chat) for chat in chats), Example("a row", CALLING, tools=(TOOL,))]


def with_template(name: str):
    """The embedded model's tokenizer, with a template of trl's and the control tokens of it."""
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = copy.deepcopy(load_tokenizer("builtin:smollm2-135m"))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(CONTROL.findall(text)))})
    tokenizer.chat_template = text
    return tokenizer


def encoded(encoder: Encoder, example: Example) -> Document:
    return encoder([example])[0]


def trained(encoder: Encoder, example: Example) -> str:
    document = encoded(encoder, example)
    return encoder.tokenizer.decode(document.ids[document.weights > 0])


@pytest.mark.parametrize("name", sorted(set(MARKED) - NEEDS_AN_IMAGE))
def test_masks_are_those_that_trl_trains_with(name):
    """trl takes `assistant_masks` of transformers' apply_chat_template for these templates."""
    tokenizer = with_template(name)
    encoder = Encoder(tokenizer)
    compared = 0
    for example in examples():
        try:
            expected = tokenizer.apply_chat_template(
                list(example.messages),
                tools=list(example.tools) or None,
                return_assistant_tokens_mask=True,
                return_dict=True,
            )
        except (TemplateError, UndefinedError, TypeError):
            with pytest.raises(UserError, match="a row: the chat template refuses"):
                encoded(encoder, example)
            continue
        document = encoded(encoder, example)
        assert document.ids.tolist() == expected["input_ids"]
        assert (document.weights > 0).astype(int).tolist() == expected["assistant_masks"]
        assert sum(expected["assistant_masks"]) > 0
        compared += 1
    assert compared >= 2


UNMARKED = {
    **dict.fromkeys(["cohere", "cohere2", "diffusion_gemma", "gemma", "gemma3", "lfm2"], ""),
    **dict.fromkeys(["lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "qwen3_vl"], ""),
    "qwen3_instruct_2507": "",
    "deepseek_r1_distill": "<\uff5cAssistant\uff5c>",
    "deepseekv3": "<\uff5cAssistant\uff5c>",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    "nemotron_3_nano": "<think></think>",
    "nemotron_3_super": "<think></think>",
    "nemotron_3_ultra": "<think></think>",
    "qwen2_5": "\n",
}
"""Templates as published, without marks -> the part of an answer's header that trl's variant trains,
although the prompt of an answer already says it."""


@pytest.mark.parametrize("name", UNMARKED)
def test_without_marks_the_same_answers_are_found(name):
    """All that differs: a published template's header, and white space after the end of a turn."""
    theirs, ours = Encoder(with_template(f"{name}_training")), Encoder(with_template(name))
    header = UNMARKED[name]
    compared = 0
    writes_turns_anew = name in ("gptoss", "muse_glimmer")
    for example in examples()[: 1 if writes_turns_anew else 2 if header else 3]:
        try:
            expected = trained(theirs, example)
        except UserError:
            continue
        end = re.compile(r"(" + CONTROL.pattern + r")\s+")
        found = trained(ours, example)
        answers = [m["content"] for m in example.messages if m["role"] == "assistant"]
        assert end.sub(r"\1", found) == end.sub(r"\1", expected.replace(header, ""))
        assert all(answer.strip() in found for answer in answers)
        compared += 1
    assert compared >= 1


# --- Meta's own ----------------------------------------------------------------------------------

META = Path(find_spec("llama_models").origin).parent / "llama3" / "tokenizer.model"


@pytest.fixture(scope="module")
def llama3():
    return load_tokenizer(META)


@pytest.fixture(scope="module")
def meta():
    return ChatFormat(Tokenizer(META))


def by_meta(meta: ChatFormat, messages: list[RawMessage]) -> tuple[list[int], list[int]]:
    """Ids, and a mask of what the assistant writes: all of a turn but its header."""
    ids, mask = [meta.tokenizer.special_tokens["<|begin_of_text|>"]], [0]
    for message in messages:
        header = len(meta._encode_header(message.role))
        tokens, _ = meta.encode_message(message, tool_prompt_format=None)
        ids += tokens
        answer = int(message.role == "assistant")
        mask += [0] * header + [answer] * (len(tokens) - header)
    return ids, mask


def raw(messages) -> list[RawMessage]:
    return [RawMessage(role=m["role"], content=m["content"].strip()) for m in messages]


def mask(document: Document) -> list[int]:
    return (document.weights > 0).astype(int).tolist()


@pytest.mark.parametrize("chat", CHATS)
def test_llama3_is_metas(llama3, meta, chat):
    messages = tuple({"role": role, "content": content} for role, content in chat)
    document = encoded(Encoder(llama3), Example("a row", messages))
    ids, expected = by_meta(meta, raw(messages))
    assert document.ids.tolist() == ids
    assert mask(document) == expected


def llama3_1():
    tokenizer = load_tokenizer(META)
    set_chat_template(tokenizer, "llama3.1")
    return tokenizer


OPENING = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@pytest.mark.parametrize("chat", CHATS)
def test_llama3_1_is_metas(meta, chat):
    """Meta's description of the format, whose dates stand before the system message."""
    messages = tuple({"role": role, "content": content} for role, content in chat)
    document = encoded(Encoder(llama3_1()), Example("a row", messages))
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rest = messages[1:] if system else messages
    opening = RawMessage(role="system", content=OPENING + system)
    ids, expected = by_meta(meta, [opening, *raw(rest)])
    assert document.ids.tolist() == ids
    assert mask(document) == expected


def test_llama3_1_writes_functions_as_published_and_results_as_meta(meta):
    """The published template's text, but for a result, which it writes as a JSON string and Meta's
    ChatFormat as it is."""
    document = encoded(Encoder(llama3_1()), Example("a row", CALLING, tools=(TOOL,)))
    published = (TEMPLATES / "llama3_1.jinja").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(META)
    tokenizer.chat_template = published
    text = tokenizer.apply_chat_template(list(CALLING), tools=[TOOL], tokenize=False)
    written = '"{\\"celsius\\": 9}"'
    assert written in text
    expected = tokenizer(text.replace(written, '{"celsius": 9}'), add_special_tokens=False)
    assert document.ids.tolist() == expected["input_ids"]

    result, _ = meta.encode_message(RawMessage(role="tool", content='{"celsius": 9}'), None)
    ids = document.ids.tolist()
    at = next(i for i in range(len(ids)) if ids[i : i + len(result)] == result)
    assert not document.weights[at : at + len(result)].any()
    said = tokenizer.decode(document.ids[np.flatnonzero(document.weights)])
    assert said == (
        '{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>No, 9 degrees.<|eot_id|>'
    )


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_a_text_is_the_one_that_transformers_writes(path: Path, tokenizer) -> None:
    """For every template of trl: the same characters, or both refuse."""
    template = path.read_text(encoding="utf-8")
    variables = dict(tokenizer.special_tokens_map)
    compared = 0
    for example in examples():
        chat, tools = list(example.messages), list(example.tools) or None
        for prompt in (False, True):
            asked = {"tools": tools, "variables": variables, "prompt": prompt}
            try:
                expected = tokenizer.apply_chat_template(
                    chat,
                    tools=tools,
                    chat_template=template,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            except Exception:
                with pytest.raises(TemplateRefusedError):
                    renderer().render(template, [chat], **asked)
                continue
            (written,) = renderer().render(template, [chat], **asked)
            assert written.text == expected
            compared += 1
    assert compared or path.stem.removesuffix("_training") == "llava_next"
