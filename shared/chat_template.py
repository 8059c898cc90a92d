"""Renders conversations by the base model's own chat template, in a sandbox.

Templates come with the model and never from a request, a dataset or an adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]
MAX_RENDERED_CHARS = 16 << 20


class ChatTemplateError(ValueError):
    """The template does not accept this conversation; the message is for its author."""


class GenerationBlock(Extension):
    """`{% generation %}` marks an assistant's words in some templates; the text is the same without."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """`variables` are the texts of the special tokens, such as bos_token."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
            autoescape=False,  # the output is a prompt, not a page
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        self._template = environment.from_string(source)
        self._variables = variables

    def render(
        self, messages: Sequence[Message], tools: Sequence[Message] | None, add_generation_prompt: bool
    ) -> str:
        try:
            pieces, num_chars = [], 0
            for piece in self._template.generate(
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            ):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise ChatTemplateError(
                        f"the rendered conversation has over {MAX_RENDERED_CHARS} characters"
                    )
        except (TemplateError, TypeError) as error:
            raise ChatTemplateError(f"the chat template refuses the conversation: {error}") from error
        return "".join(pieces)


def canonical(message: Message) -> Message:
    """The form that templates of Hugging Face models expect.

    A developer speaks as the system, an absent content is empty, and a call's arguments are an object.
    """
    role = "system" if message["role"] == "developer" else message["role"]
    kept = {name: value for name, value in message.items() if name != "weight" and value is not None}
    kept |= {"role": role, "content": message.get("content") or ""}
    if "tool_calls" in kept:
        kept["tool_calls"] = [canonical_call(call) for call in kept["tool_calls"]]
    return kept


def canonical_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def texts_in(value: Any) -> Iterator[str]:
    """Every string within, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from texts_in(each)
    elif isinstance(value, dict):
        yield from texts_in([*value.keys(), *value.values()])


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(each, change) for each in value]
    if isinstance(value, dict):
        return {change(name): map_texts(each, change) for name, each in value.items()}
    return value


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
