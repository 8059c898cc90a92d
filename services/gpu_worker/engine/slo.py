"""Service levels: how long a request may wait for its first token and between tokens, and who yields to whom."""

from __future__ import annotations

from dataclasses import dataclass

NUM_RANKS = 3
FLEX = 2  # the rank of those who wait even for a next token, while they have time


@dataclass(frozen=True, slots=True)
class SLO:
    tpot_ms: float  # time per output token
    ttft_ms: float  # time to first token
    rank: int = 1  # in range(NUM_RANKS): of two requests the one with the higher rank yields


DEFAULT_TIER = "default"
DEFAULT_SLO = SLO(tpot_ms=250.0, ttft_ms=2000.0)
