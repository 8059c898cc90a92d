"""Requests of a real service at any rate: a trace's arrivals thinned, its lengths scaled to a model's context."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

TRACE = Path(__file__).parent.parent / "data" / "azure" / "conversation.csv"
BEGIN_S = 240.0  # the trace's service is warming up before
LONGEST = 16_384  # tokens that a request of the trace may have, prompt and answer


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float  # after the start
    prompt_tokens: int
    output_tokens: int


def arrivals(rate: float, seconds: float, context: int, seed: int = 0) -> list[Arrival]:
    """About `rate` requests a second for `seconds`: of the trace after its first minutes each is kept with the same
    probability, so that its bursts stay. The same arguments give the same requests."""
    rows = [row for row in _rows() if BEGIN_S <= row.at_s < BEGIN_S + seconds]
    if rate * seconds > len(rows):
        raise ValueError(f"the trace has {len(rows)} requests in {seconds:g} s, fewer than {rate:g} a second")
    rng, scale = random.Random(seed), context / LONGEST
    return [
        Arrival(
            row.at_s - BEGIN_S,
            max(2, round(row.prompt_tokens * scale)),
            max(2, round(row.output_tokens * scale)),
        )
        for row in rows
        if rng.random() < rate * seconds / len(rows)
    ]


def _rows() -> list[Arrival]:
    with TRACE.open() as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        Arrival((time - times[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for time, row in zip(times, rows, strict=True)
    ]
