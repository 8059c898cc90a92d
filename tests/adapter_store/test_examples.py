"""Single lines of training files: what is accepted, and how the rest is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.adapter_store.examples import (
    ChatExample,
    CompletionExample,
    ExampleError,
    parse_example,
)

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}


def chat(*messages: dict[str, Any], **keys: Any) -> bytes:
    return json.dumps({"messages": list(messages), **keys}).encode()


def test_chat_and_completion_lines_are_read() -> None:
    assert parse_example(chat(USER, BOT)) == ChatExample([USER, BOT], None)
    line = b'{"prompt": "2+2=", "completion": " 4"}'
    assert parse_example(line) == CompletionExample("2+2=", " 4")


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    example = parse_example(chat(USER, {"role": "assistant", "content": parts}))
    assert isinstance(example, ChatExample) and example.messages[1]["content"] == "Hello"


def test_a_tool_call_needs_no_content() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "1", "content": "3"}, BOT]
    example = parse_example(chat(*messages, tools=[{"type": "function"}], parallel_tool_calls=True))
    assert isinstance(example, ChatExample) and example.uses_tools
    assert example.messages[1]["content"] is None


def test_weights_are_kept() -> None:
    example = parse_example(chat(USER, {**BOT, "weight": 0}, USER, {**BOT, "weight": 1}))
    assert isinstance(example, ChatExample)
    assert [message.get("weight") for message in example.messages] == [None, 0, None, 1]


REFUSED: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[1, 2]", "expected a JSON object, found a list"),
    (b'"text"', "found a string"),
    (b"null", "found nothing"),
    (b"{}", 'expected the key "messages"'),
    (b'{"text": "x"}', 'expected the key "messages"'),
    (b'{"prompt": "x"}', '"completion" must be a string, found nothing'),
    (b'{"prompt": "x", "completion": ""}', "nothing to learn"),
    (b'{"prompt": 1, "completion": "x"}', '"prompt" must be a string, found a number'),
    (b'{"prompt": "x", "completion": "y", "id": 1}', "unknown key 'id'"),
    (b'{"messages": []}', "found an empty list"),
    (b'{"messages": {}}', "found an object"),
    (b'{"messages": ["x"]}', "messages[0] must be an object, found a string"),
    (b'{"messages": [{"role": "user", "role": "assistant"}]}', "'role' appears twice"),
    (b'{"prompt": "x", "completion": NaN}', "NaN is not a JSON number"),
    (b'{"prompt": "x", "completion": -Infinity}', "-Infinity is not"),
    (b'{"prompt": "x", "completion": 1e999}', "1e999' is out of range"),
    (b'{"prompt": "x", "completion": 1' + b"0" * 5000 + b"}", "not JSON"),
    (b'{"prompt": "\xff", "completion": "x"}', "not UTF-8: byte 0xff at byte 13"),
    (b'{"prompt": "\\ud800", "completion": "x"}', "lone surrogate \\ud800"),
    (b'{"\\udc00": 1, "messages": []}', "lone surrogate"),
    (b'{"messages": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper than 32"),
    (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 32"),
    (chat(USER), "last message must be the assistant's, found user"),
    (chat(USER, {**BOT, "weight": 0}), "every assistant message has weight 0"),
    (chat(USER, {**BOT, "weight": 2}), "messages[1].weight must be 0 or 1, found 2"),
    (chat(USER, {**BOT, "weight": True}), "messages[1].weight must be 0 or 1, found True"),
    (chat({**USER, "weight": 1}, BOT), "unknown key 'weight' in messages[0] (user)"),
    (chat({"role": "boss", "content": "x"}, BOT), "messages[0].role must be one of"),
    (chat({"content": "x"}, BOT), "found None"),
    (chat({"role": "user"}, BOT), "messages[0].content must be a string"),
    (chat({"role": "user", "content": []}, BOT), "found an empty list"),
    (chat({"role": "user", "content": [{"type": "image_url"}]}, BOT), "messages[0].content[0] must be"),
    (chat({**USER, "name": 3}, BOT), "messages[0].name must be a string"),
    (chat({**USER, "foo": 3}, BOT), "unknown key 'foo' in messages[0]"),
    (chat(USER, BOT, foo=1), "unknown key 'foo' in the example"),
    (chat(USER, BOT, tools={}), '"tools" must be a list'),
    (chat(USER, {"role": "assistant", "tool_calls": []}), "at least one call"),
    (chat(USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}), "tool_calls[0] needs a function's name"),
    (chat(*[USER, BOT] * 513), "has 1026 messages; the limit is 1024"),
]


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_a_line_that_is_no_example_says_why(line: bytes, words: str) -> None:
    with pytest.raises(ExampleError) as caught:
        parse_example(line)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300
