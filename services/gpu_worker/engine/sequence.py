"""A request inside the engine: its tokens, how many of them are computed, and how the next one is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SAMPLING_BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (0, math.inf),
    "temperature": (0, 100),
    "top_p": (1e-9, 1),
    "top_k": (0, math.inf),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "logprobs": (0, math.inf),
    "prompt_logprobs": (0, math.inf),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0 means all."""

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # end the sequence and are not part of it
    logprobs: int | None = None  # alternatives beside the chosen token
    prompt_logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        neutral = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return not neutral or bool(self.logit_bias)

    def find_problem(self, vocab_size: int) -> str | None:
        """Words for a value that no token can be drawn with; None where all are fine."""
        for name, (low, high) in SAMPLING_BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                return f"{name} {value} is not in [{low}, {high}]"
        for token, bias in self.logit_bias:
            if not 0 <= token < vocab_size or not math.isfinite(bias):
                return f"logit_bias {bias} of token {token}: a number, of a token in [0, {vocab_size})"
        return None


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of a token, and of the most likely ones: (token id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is the prompt and what has been generated; the engine's work is `num_tokens - num_computed`."""

    request_id: str
    tokens: list[int]
    num_prompt_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None  # content digest, pinned in the pool while the sequence lives
    cache_seed: bytes | None = b""  # start of the prefix cache's hash chain; None: neither read nor written
    tpot_slo_ms: float = 250.0
    ttft_slo_ms: float = 2000.0
    num_virtual_tokens: int = 0  # in front of the prompt and counted with it; they have no id
    arrival_s: float = 0.0
    last_token_s: float | None = None  # monotonic time of the newest token
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks registered or matched
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.tokens) - self.num_computed_tokens

    def deadline_s(self) -> float:
        """When the next token is due."""
        if self.last_token_s is None:
            return self.arrival_s + self.ttft_slo_ms / 1000
        return self.last_token_s + self.tpot_slo_ms / 1000
