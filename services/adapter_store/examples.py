"""One line of a training file: strict JSON, and one of two shapes.

    {"messages": [{"role", "content", ...}], "tools"?, "parallel_tool_calls"?}
    {"prompt": "...", "completion": "..."}

Nothing is repaired or dropped in silence: whatever is not understood is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 32
MAX_MESSAGES = 1024
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CHAT_KEYS = {"messages", "tools", "parallel_tool_calls"}
COMPLETION_KEYS = {"prompt", "completion"}
MESSAGE_KEYS = {"role", "content", "name"}
ROLE_KEYS = {
    "assistant": {"weight", "tool_calls", "function_call", "refusal"},
    "tool": {"tool_call_id"},
}


class ExampleError(ValueError):
    """The line is no training example; the message says why and where in the line."""


@dataclass(frozen=True, slots=True)
class ChatExample:
    messages: list[dict[str, Any]]  # contents are strings or None
    tools: list[dict[str, Any]] | None

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) or any(
            message.get("tool_calls") or message.get("function_call") for message in self.messages
        )


@dataclass(frozen=True, slots=True)
class CompletionExample:
    prompt: str
    completion: str


def parse_example(line: bytes) -> ChatExample | CompletionExample:
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ExampleError(f"expected a JSON object, found {kind(value)}")
    if "messages" in value:
        return parse_chat(value)
    if "prompt" in value or "completion" in value:
        return parse_completion(value)
    raise ExampleError('expected the key "messages", or "prompt" and "completion"')


def parse_json(line: bytes) -> Any:
    """Refuses what readers disagree about: duplicate keys, NaN, numbers beyond floats, broken text."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ExampleError(f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1}") from None
    try:
        value = json.loads(
            text, object_pairs_hook=unique_keys, parse_constant=no_constant, parse_float=finite_float
        )
    except ExampleError:
        raise
    except json.JSONDecodeError as error:
        raise ExampleError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ExampleError(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ExampleError(f"not JSON: {error}") from None
    check_tree(value, may_have_surrogates=b"\\u" in line)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ExampleError(f"the key {short(twice)} appears twice in one object")
    return found


def no_constant(name: str) -> Any:
    raise ExampleError(f"{name} is not a JSON number")


def finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ExampleError(f"the number {short(text)} is out of range")
    return value


def check_tree(value: Any, *, may_have_surrogates: bool) -> None:
    """Bounded depth, and no half of a surrogate pair, which no UTF-8 text can hold."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ExampleError(f"nested deeper than {MAX_DEPTH} levels")
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each.keys(), *each.values()] if may_have_surrogates else each.values()
            elif isinstance(each, list):
                inner += each
            elif may_have_surrogates and isinstance(each, str):
                check_text(each)
        level, depth = inner, depth + 1


def check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ExampleError(f"lone surrogate \\u{ord(text[error.start]):04x} in a string") from None


def parse_completion(value: dict[str, Any]) -> CompletionExample:
    check_keys(value, COMPLETION_KEYS, "the example")
    for key in ("prompt", "completion"):
        if not isinstance(value.get(key), str):
            raise ExampleError(f'"{key}" must be a string, found {kind(value.get(key))}')
    if not value["completion"]:
        raise ExampleError('"completion" is empty: there is nothing to learn')
    return CompletionExample(value["prompt"], value["completion"])


def parse_chat(value: dict[str, Any]) -> ChatExample:
    check_keys(value, CHAT_KEYS, "the example")
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ExampleError(f'"messages" must be a list with at least one message, found {kind(messages)}')
    if len(messages) > MAX_MESSAGES:
        raise ExampleError(f'"messages" has {len(messages)} messages; the limit is {MAX_MESSAGES}')
    parsed = [parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if parsed[-1]["role"] != "assistant":
        raise ExampleError(f"the last message must be the assistant's, found {parsed[-1]['role']}")
    if all(message.get("weight") == 0 for message in parsed if message["role"] == "assistant"):
        raise ExampleError("every assistant message has weight 0: there is nothing to learn")
    return ChatExample(parsed, parse_tools(value.get("tools")))


def parse_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ExampleError(f"{where} must be an object, found {kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise ExampleError(f"{where}.role must be one of {', '.join(ROLES)}, found {short(role)}")
    check_keys(message, MESSAGE_KEYS | ROLE_KEYS.get(role, set()), f"{where} ({role})")
    if "weight" in message and (message["weight"] not in (0, 1) or isinstance(message["weight"], bool)):
        raise ExampleError(f"{where}.weight must be 0 or 1, found {short(message['weight'])}")
    if "name" in message and not isinstance(message["name"], str):
        raise ExampleError(f"{where}.name must be a string, found {kind(message['name'])}")
    calls = check_calls(message, where)
    return {**message, "content": parse_content(message.get("content"), where, required=not calls)}


def check_calls(message: dict[str, Any], where: str) -> bool:
    """True when the message calls tools, so that it needs no content."""
    calls = message.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not calls):
        raise ExampleError(f"{where}.tool_calls must be a list with at least one call, found {kind(calls)}")
    for i, call in enumerate(calls or []):
        check_function(call.get("function") if isinstance(call, dict) else None, f"{where}.tool_calls[{i}]")
    if message.get("function_call") is not None:
        check_function(message["function_call"], f"{where}.function_call")
    return bool(calls) or message.get("function_call") is not None


def check_function(function: Any, where: str) -> None:
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    if not named or not isinstance(function.get("arguments"), str):
        raise ExampleError(f"{where} needs a function's name and arguments, both strings")


def parse_content(content: Any, where: str, *, required: bool) -> str | None:
    """The text; text parts are joined."""
    if content is None and not required:
        return None
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ExampleError(f"{where}.content must be a string or a list of text parts, found {kind(content)}")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ExampleError(f'{where}.content[{i}] must be {{"type": "text", "text": "..."}}')
    return "".join(part["text"] for part in content)


def parse_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ExampleError('"tools" must be a list of objects')
    return tools


def check_keys(value: dict[str, Any], known: set[str], where: str) -> None:
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise ExampleError(f"unknown key {short(unknown)} in {where}")


NAMES: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda value: value is None, "nothing"),
    (lambda value: isinstance(value, bool), "a boolean"),
    (lambda value: isinstance(value, int | float), "a number"),
    (lambda value: isinstance(value, str), "a string"),
    (lambda value: isinstance(value, list), "a list"),
)


def kind(value: Any) -> str:
    """What a person calls it."""
    if value == [] and isinstance(value, list):
        return "an empty list"
    return next((name for matches, name in NAMES if matches(value)), "an object")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
