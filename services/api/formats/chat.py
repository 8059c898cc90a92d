"""`chat.completion` and `chat.completion.chunk`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from services.api.formats.logprobs import chat_logprobs
from services.api.generation import Delta
from services.api.inference import Run
from services.api.streaming import DONE, event
from shared.tokenizer import ChatTokenizer


@dataclass(slots=True)
class Collected:
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class ChatFormat:
    run: Run
    tokenizer: ChatTokenizer
    with_logprobs: bool
    include_usage: bool = False

    async def collect(self, deltas: AsyncIterator[Delta]) -> dict[str, Any]:
        collected = [Collected() for _ in self.run.choices]
        async for delta in deltas:
            choice = collected[delta.index]
            choice.text += delta.text
            choice.logprobs += self._logprobs(delta)
            choice.finish_reason = delta.finish_reason or choice.finish_reason
        choices = [self._choice(index, choice) for index, choice in enumerate(collected)]
        return self._head("chat.completion") | {"choices": choices, "usage": self.run.usage()}

    async def stream(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """One chunk for each piece of news; the role first, the finish reason last."""
        try:
            for choice in self.run.choices:
                yield self._chunk(choice.index, {"role": "assistant", "content": "", "refusal": None})
            async for delta in deltas:
                logprobs = self._logprobs(delta)
                if delta.text or logprobs:
                    yield self._chunk(delta.index, {"content": delta.text}, logprobs=logprobs)
                if delta.finish_reason:
                    yield self._chunk(delta.index, {}, finish_reason=delta.finish_reason)
            if self.include_usage:
                yield event(self._head("chat.completion.chunk") | {"choices": [], "usage": self.run.usage()})
            yield DONE
        finally:
            await deltas.aclose()

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.run.id,
            "object": kind,
            "created": self.run.created,
            "model": self.run.order.target.model,
            "system_fingerprint": self.run.order.target.fingerprint,
            "service_tier": self.run.order.tier,
        }

    def _choice(self, index: int, choice: Collected) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": {"content": choice.logprobs, "refusal": None} if self.with_logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": finish_reason,
        }
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return event(chunk | {"usage": None} if self.include_usage else chunk)

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        if not (self.with_logprobs and delta.logprobs):
            return []
        return chat_logprobs(self.tokenizer, delta.tokens, delta.logprobs)
