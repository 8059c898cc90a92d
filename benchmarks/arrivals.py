"""Requests of a real service at any rate: a trace's arrivals thinned, its lengths scaled to a model's context."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

TRACE = Path(__file__).parent.parent / "data" / "azure" / "conversation.csv"
LONGEST = 16_384  # tokens that a request of the trace may have, prompt and answer


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float  # after the start
    prompt_tokens: int
    output_tokens: int


def arrivals(rate: float, seconds: float, context: int, seed: int = 0) -> list[Arrival]:
    """About `rate` requests a second for `seconds`; each of the trace is kept with the same probability, so that
    its bursts stay. The same arguments give the same requests."""
    rows = _rows()
    mean_rate = len(rows) / rows[-1].at_s
    if rate > mean_rate:
        raise ValueError(f"the trace has {mean_rate:.1f} requests a second, fewer than {rate}")
    rng, scale = random.Random(seed), context / LONGEST
    return [
        Arrival(row.at_s, max(2, round(row.prompt_tokens * scale)), max(2, round(row.output_tokens * scale)))
        for row in rows
        if row.at_s < seconds and rng.random() < rate / mean_rate
    ]


def _rows() -> list[Arrival]:
    with TRACE.open() as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        Arrival((time - times[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for time, row in zip(times, rows, strict=True)
    ]
