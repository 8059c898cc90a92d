"""Token ids to text while they arrive: whole characters only, and nothing that a stop string may take back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # of the prompt: some tokenizers spell a token by what stands before it
MAX_HELD_TOKENS = 16  # a character has four bytes at most; beyond this the bytes are no text
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class IncrementalDetokenizer:
    """Text given out is final: characters are held back until all their bytes are there."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        if self._decode(self._tokens).endswith(REPLACEMENT):  # the prompt ends within a character
            self._tokens = []
        self._read = len(self._tokens)  # this much has been given out; it is the context of what follows

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        return "".join(self._push_one(token) for token in tokens)

    def flush(self) -> str:
        """What is held back, with replacement characters for bytes that never became a character."""
        text = self._new_text()
        self._advance()
        return text

    def _push_one(self, token: int) -> str:
        self._tokens.append(token)
        text = self._new_text()
        is_whole = not text.endswith(REPLACEMENT) or len(self._tokens) - self._read > MAX_HELD_TOKENS
        if not text or not is_whole:
            return ""
        self._advance()
        return text

    def _advance(self) -> None:
        del self._tokens[: self._read]
        self._read = len(self._tokens)

    def _new_text(self) -> str:
        known = self._decode(self._tokens[: self._read])
        return self._decode(self._tokens)[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class StopScanner:
    """Ends the text before the first stop string that is complete, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that no stop string can take back; sets `is_stopped` when one is complete."""
        if self.is_stopped:
            return ""
        self._held += text
        spans = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if spans:
            self.is_stopped = True
            before, self._held = self._held[: min(spans)[1]], ""
            return before
        safe = len(self._held) - self._num_suspect()
        out, self._held = self._held[:safe], self._held[safe:]
        return out

    def flush(self) -> str:
        """At the end of the text: what looked like the start of a stop string and was none."""
        out, self._held = self._held, ""
        return out

    def _num_suspect(self) -> int:
        """Length of the longest end of the text that some stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0


class TokenBytes:
    """The bytes that each token stands for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._is_byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["decoder"])

    def __getitem__(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        text = self._tokenizer.id_to_token(token_id)
        if text is None:
            return b""
        if self._is_byte_level:
            return bytes(byte_of_char()[char] for char in text)
        fallback = BYTE_TOKEN.fullmatch(text)
        return bytes.fromhex(fallback[1]) if fallback else text.replace("▁", " ").encode()


@cache
def byte_of_char() -> dict[str, int]:
    """The printable characters by which byte-level tokenizers write bytes (GPT-2's table, inverted)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}
