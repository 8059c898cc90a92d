"""Log-probabilities in the two shapes of the API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.messages import TokenLogprob
from shared.tokenizer import ChatTokenizer

LOWEST = -9999.0  # JSON has no minus infinity


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def chat_logprobs(
    tokenizer: ChatTokenizer, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]
) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(token)
        text = spelled.decode("utf-8", "replace")
        return {"token": text, "logprob": finite(logprob), "bytes": list(spelled)}

    return [
        entry(token, given.logprob) | {"top_logprobs": [entry(*alternative) for alternative in given.top]}
        for token, given in zip(tokens, logprobs, strict=True)
    ]


@dataclass(slots=True)
class CompletionLogprobs:
    """The older shape: parallel lists. `offset` is where in the choice's text the next token stands."""

    tokenizer: ChatTokenizer
    num_top: int
    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> None:
        for token, given in zip(tokens, logprobs, strict=True):
            text = self._text(token)
            self.tokens.append(text)
            self.text_offset.append(self.offset)
            self.offset += len(text)
            self.token_logprobs.append(None if given is None else finite(given.logprob))
            self.top_logprobs.append(None if given is None or not self.num_top else self._top(token, given))

    def take(self) -> dict[str, Any]:
        """What was added since the last call."""
        taken = {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []
        return taken

    def _top(self, token: int, given: TokenLogprob) -> dict[str, float]:
        """Of alternatives that are spelled alike the likeliest counts; the token itself is always there."""
        top: dict[str, float] = {}
        for alternative, logprob in (*given.top, (token, given.logprob)):
            text = self._text(alternative)
            top[text] = max(finite(logprob), top.get(text, LOWEST))
        return top

    def _text(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")
