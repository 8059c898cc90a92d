"""The base model as the API knows it: names, digests, its tokenizer; no weights."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from pydantic import SecretStr

from services.api.errors import ContextLengthError
from shared.chat_template import ChatTemplateError, Message
from shared.config import Settings
from shared.errors import InvalidRequestError
from shared.model_folder import describe_model, read_chat_template, read_json
from shared.tokenizer import ChatTokenizer

MIN_PROMPT_BYTES = 64 << 10
DEFAULT_MAX_TOKENS = 16_384  # of a request that names no limit
BYTES_PER_TOKEN = 16  # beyond this many for each token of context a text cannot fit


@dataclass(frozen=True, slots=True)
class BaseModel:
    """Tokenises outside the event loop, so that one long prompt delays nobody else's tokens."""

    id: str
    base_digest: str
    max_model_len: int
    max_train_len: int
    renders_tools: bool
    created_at: int
    tokenizer: ChatTokenizer

    @classmethod
    def load(cls, settings: Settings) -> BaseModel:
        """Raises ModelFolderError. Takes seconds where the weights have not been hashed before."""
        folder = describe_model(settings.model_dir)
        max_positions = read_max_positions(settings.model_dir)
        return cls(
            id=settings.model_id,
            base_digest=folder.base_digest,
            max_model_len=min(settings.max_model_len, max_positions),
            max_train_len=min(settings.finetune_tokens_in_flight, max_positions),
            renders_tools="tools" in (read_chat_template(settings.model_dir) or ""),
            created_at=int((settings.model_dir / "config.json").stat().st_mtime),
            tokenizer=ChatTokenizer(settings.model_dir),
        )

    @property
    def max_prompt_bytes(self) -> int:
        return max(MIN_PROMPT_BYTES, BYTES_PER_TOKEN * self.max_model_len)

    async def encode_chat(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> list[int]:
        self.check_size(len(orjson.dumps([messages, tools])))
        try:
            return await asyncio.to_thread(self.tokenizer.encode_chat, messages, tools)
        except ChatTemplateError as error:
            raise InvalidRequestError(str(error), param="messages") from None

    async def encode_prompt(self, text: str) -> list[int]:
        """At least one token: an empty prompt starts a text, as after its predecessor's end."""
        self.check_size(len(text.encode()))
        tokens = await asyncio.to_thread(self.tokenizer.encode_prompt, text)
        return tokens or [self.tokenizer.eos_token_id]

    def check_size(self, num_bytes: int) -> None:
        """Refuses what cannot fit before spending time on tokenising it."""
        if num_bytes > self.max_prompt_bytes:
            raise ContextLengthError(
                f"This model's maximum context length is {self.max_model_len} tokens, "
                f"which a prompt of {num_bytes} bytes exceeds."
            )

    def check_tokens(self, token_ids: Sequence[int], param: str) -> None:
        for token in token_ids:
            if token >= self.tokenizer.vocab_size:
                raise InvalidRequestError(
                    f"{param}: {token} is not a token id below {self.tokenizer.vocab_size}", param=param
                )

    def max_tokens(self, num_prompt_tokens: int, asked: int | None, num_virtual_tokens: int = 0) -> int:
        """How many tokens may follow the prompt: as asked, else what is left of the context behind an adapter's
        virtual tokens. Raises ContextLengthError."""
        longest = self.max_model_len - num_virtual_tokens
        left = longest - num_prompt_tokens
        if left < (1 if asked is None else asked):
            wanted = "" if asked is None else f" and {asked} for the completion"
            raise ContextLengthError(
                f"This model's maximum context length is {longest} tokens, but you requested "
                f"{num_prompt_tokens} tokens in the prompt{wanted}. Please reduce the length."
            )
        return min(left, DEFAULT_MAX_TOKENS) if asked is None else asked


def read_max_positions(model_dir: Path) -> int:
    return int(read_json(model_dir / "config.json").get("max_position_embeddings", 1 << 30))


def cache_salt(secret: SecretStr, tenant_id: str) -> str:
    """Keeps tenants' prefix caches apart; nobody outside can guess or choose it."""
    text = f"prefix-cache {tenant_id}".encode()
    return hmac.new(secret.get_secret_value().encode(), text, hashlib.sha256).hexdigest()[:32]
