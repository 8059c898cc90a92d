"""`text_completion`, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from services.api.formats.logprobs import CompletionLogprobs
from services.api.generation import Delta
from services.api.inference import Run
from services.api.streaming import DONE, event
from shared.messages import RequestMeta
from shared.tokenizer import ChatTokenizer


@dataclass(slots=True)
class Piece:
    """What one delta adds to its choice."""

    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None


@dataclass(slots=True)
class ChoiceWriter:
    """Turns one choice's deltas into pieces, its prompt in front where it is echoed."""

    prompt: list[int]
    prompt_text: str | None  # to echo, or None
    logprobs: CompletionLogprobs | None
    _echoed: bool = False

    def write(self, delta: Delta) -> Piece:
        text = delta.text
        if self.prompt_text is not None and not self._echoed:
            self._echoed = True
            text = self.prompt_text + text
            self._add_prompt(delta.meta)
        if self.logprobs is not None and delta.logprobs:
            self.logprobs.add(delta.tokens, delta.logprobs)
        return Piece(text, self.logprobs.take() if self.logprobs else None, delta.finish_reason)

    def _add_prompt(self, meta: RequestMeta | None) -> None:
        if self.logprobs is None:
            return
        given = meta.prompt_logprobs if meta is not None else None
        if given is not None and len(given) == len(self.prompt):
            self.logprobs.add(self.prompt, given)


@dataclass(slots=True)
class CompletionFormat:
    run: Run
    tokenizer: ChatTokenizer
    prompt_texts: list[str] | None  # to echo, one a prompt
    num_logprobs: int | None
    include_usage: bool = False
    _writers: list[ChoiceWriter] = field(default_factory=list)

    def __post_init__(self) -> None:
        for choice in self.run.choices:
            number = choice.index // self.run.order.num_choices
            logprobs = None
            if self.num_logprobs is not None:
                logprobs = CompletionLogprobs(self.tokenizer, self.num_logprobs)
            text = self.prompt_texts[number] if self.prompt_texts is not None else None
            self._writers.append(ChoiceWriter(self.run.order.prompts[number], text, logprobs))

    async def collect(self, deltas: AsyncIterator[Delta]) -> dict[str, Any]:
        pieces: list[list[Piece]] = [[] for _ in self._writers]
        async for delta in deltas:
            pieces[delta.index].append(self._writers[delta.index].write(delta))
        choices = [self._choice(index, joined(own)) for index, own in enumerate(pieces)]
        return self._head() | {"choices": choices, "usage": self.run.usage()}

    async def stream(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        try:
            async for delta in deltas:
                piece = self._writers[delta.index].write(delta)
                if piece.text or piece.finish_reason or (piece.logprobs and piece.logprobs["tokens"]):
                    chunk = self._head() | {"choices": [self._choice(delta.index, piece)]}
                    yield event(chunk | {"usage": None} if self.include_usage else chunk)
            if self.include_usage:
                yield event(self._head() | {"choices": [], "usage": self.run.usage()})
            yield DONE
        finally:
            await deltas.aclose()

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.run.id,
            "object": "text_completion",
            "created": self.run.created,
            "model": self.run.order.target.model,
            "system_fingerprint": self.run.order.target.fingerprint,
            "service_tier": self.run.order.tier,
        }

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
        }


def joined(pieces: list[Piece]) -> Piece:
    logprobs: dict[str, Any] | None = None
    if pieces and pieces[0].logprobs is not None:
        names = pieces[0].logprobs
        logprobs = {
            name: [value for piece in pieces for value in (piece.logprobs or {})[name]] for name in names
        }
    return Piece(
        text="".join(piece.text for piece in pieces),
        logprobs=logprobs,
        finish_reason=next((piece.finish_reason for piece in reversed(pieces) if piece.finish_reason), None),
    )
