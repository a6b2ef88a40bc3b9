"""Messages of a chat, from the dialects in which people have them."""

from __future__ import annotations

import json
from typing import Any

from llamaweft.data.example import Message
from llamaweft.data.values import first_given, from_json, shown, string
from llamaweft.errors import UserError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""What a role may be called -> what it is. The content of a function_call is its call as JSON."""

MAX_NESTING = 64
"""Lists and objects inside each other, in what tools take and are given."""

MAX_WEIGHT = 1_000_000

_ROLE_NAMES = ("role", "from", "speaker")
_CONTENT_NAMES = ("content", "value", "text")
_PLAIN = {"role", "content"}
_PLAIN_ROLES = ("system", "user", "assistant", "tool")


def read_messages(where: str, name: str, value: Any) -> tuple[Message, ...]:
    """The messages in column `name`.

    Raises UserError, naming the message, for what is no list of messages, a missing or unknown
    role, a value of a wrong kind and a field that would be ignored.
    """
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: {name!r} must be a list with at least one message, and is {shown(value)}"
        )
    of = "" if name == "messages" else f" of {name}"
    return tuple(
        _message(f"{where}, message {number}{of}", message)
        for number, message in enumerate(value, start=1)
    )


def _message(place: str, given: Any) -> Message:
    if not isinstance(given, dict):
        raise UserError(f"{place} must be an object with role and content, and is {shown(given)}")
    if given.keys() == _PLAIN and type(given["content"]) is str and given["role"] in _PLAIN_ROLES:
        return dict(given)  # what nearly all are, read three times as fast
    fields = {name: value for name, value in given.items() if value is not None}
    called = _role(place, fields)
    message: Message = {"role": ROLES[called], "content": ""}
    content_name = first_given(fields, _CONTENT_NAMES)
    content = fields.pop(content_name, None)
    calls = fields.pop("tool_calls", None)
    if called == "function_call" and not calls:
        calls, content = _called(place, content_name, content), ""
    if content is not None or not calls:
        message["content"] = _content(place, content_name, content)
    if calls:
        message["tool_calls"] = _calls(place, message["role"], calls)
    for name in ("tool_call_id", "name"):
        if name in fields:
            message[name] = string(place, fields, name)
            del fields[name]
    if "weight" in fields:
        message["weight"] = _weight(place, fields.pop("weight"))
    if fields:
        raise UserError(
            f"{place}: {min(fields)!r} is not supported; keep role, content, tool_calls, "
            "tool_call_id, name and weight"
        )
    return message


def _role(place: str, fields: dict[str, Any]) -> str:
    """What the role is called in this dialect; it is taken out of the fields."""
    name = first_given(fields, _ROLE_NAMES)
    called = fields.pop(name, None)
    if called is None:
        raise UserError(f"{place} has no role; give it one of {', '.join(ROLES)}")
    if not isinstance(called, str) or called not in ROLES:
        raise UserError(
            f"{place}: {name!r} is {shown(called)}, which is no known role; "
            f"known are {', '.join(ROLES)}"
        )
    return called


def _content(place: str, name: str, value: Any) -> str:
    """Text, or parts of text one after another."""
    if not isinstance(value, list):
        return string(place, {name: value}, name)
    texts = []
    for number, part in enumerate(value, start=1):
        if not isinstance(part, dict):
            raise UserError(
                f"{place}: part {number} of {name!r} must be an object with type and text, "
                f"and is {shown(part)}"
            )
        if part.get("type") != "text":
            raise UserError(
                f"{place}: part {number} of {name!r} is of the type {shown(part.get('type'))}, and "
                "only text can be learnt; take images and other parts out"
            )
        extra = {key for key, value in part.items() if value is not None} - {"type", "text"}
        if extra:
            raise UserError(
                f"{place}: {min(extra)!r} in part {number} of {name!r} is not supported; "
                "keep type and text"
            )
        texts.append(string(f"{place}, part {number}", part, "text"))
    return "".join(texts)


def _weight(place: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value <= MAX_WEIGHT):  # also false for NaN
        raise UserError(
            f"{place}: 'weight' must be a number from 0 to {MAX_WEIGHT:,}, and is {shown(value)}"
        )
    return float(value)


# --- tools ---------------------------------------------------------------------------------------


def read_tools(where: str, content: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The functions that a chat offers, from the column `tools`: a list, or JSON of one.

    A bare function becomes OpenAI's form. Raises UserError, naming the tool, for anything else.
    """
    tools = content.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = from_json(where, "tools", tools)
    if not tools:
        return ()
    if not isinstance(tools, list):
        raise UserError(f"{where}: 'tools' must be a list of functions, and is {shown(tools)}")
    return tuple(_tool(f"{where}, tool {number}", tool) for number, tool in enumerate(tools, 1))


def _tool(place: str, tool: Any) -> dict[str, Any]:
    if isinstance(tool, dict) and tool.get("function") is None:
        bare = {name: value for name, value in tool.items() if name not in ("type", "function")}
        tool = {"type": tool.get("type"), "function": bare}
    if not _is_function(tool):
        raise UserError(
            f"{place} must be a function: an object with name, description and parameters"
        )
    return _sound(place, tool | {"type": "function"})


def _calls(place: str, role: str, calls: Any) -> list[dict[str, Any]]:
    """An answer's calls in OpenAI's form, with arguments as an object."""
    if role != "assistant":
        raise UserError(f"{place}: 'tool_calls' belong to an assistant message, not to {role}")
    if not isinstance(calls, list):
        raise UserError(f"{place}: 'tool_calls' must be a list, and is {shown(calls)}")
    return [_call(f"{place}, call {number}", call) for number, call in enumerate(calls, start=1)]


def _called(place: str, name: str, value: Any) -> Any:
    """The calls that the content of a function_call says, as JSON of one or of a list."""
    calls = from_json(place, name, value) if isinstance(value, str) else value
    if not calls:
        raise UserError(
            f"{place}: {name!r} of a function_call must be JSON with name and arguments"
        )
    return [calls] if isinstance(calls, dict) else calls


def _call(place: str, call: Any) -> dict[str, Any]:
    if isinstance(call, dict) and call.get("function") is None:
        bare = {name: call[name] for name in ("name", "arguments") if name in call}
        call = {name: call[name] for name in call if name not in bare} | {"function": bare}
    if not _is_function(call):
        raise UserError(f"{place} must be a function call: an object with name and arguments")
    function = call["function"]
    extra = _given(call) - {"id", "type", "function"} | _given(function) - {"name", "arguments"}
    if extra:
        raise UserError(
            f"{place}: {min(extra)!r} is not supported; keep id, type, name and arguments"
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = from_json(place, "arguments", arguments)
    if not isinstance(arguments, dict):
        raise UserError(f"{place}: 'arguments' must be an object, and is {shown(arguments)}")
    read = {"id": string(place, call, "id")} if call.get("id") is not None else {}
    return read | {
        "type": "function",
        "function": {"name": function["name"], "arguments": _sound(place, arguments)},
    }


def _is_function(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return isinstance(name, str) and bool(name) and value.get("type") in (None, "function")


def _given(fields: dict[str, Any]) -> set[str]:
    return {name for name, value in fields.items() if value is not None}


def _sound(place: str, value: dict[str, Any]) -> dict[str, Any]:
    """`value`, which templates must be able to write as JSON."""
    try:
        if not _nests_within(value, MAX_NESTING):
            raise UserError(f"{place} nests deeper than {MAX_NESTING} levels; flatten it")
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        raise UserError(
            f"{place} holds what JSON cannot say, such as a date, NaN or half a character; mend it"
        ) from None
    return value


def _nests_within(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_nests_within(item, levels - 1) for item in inner)
