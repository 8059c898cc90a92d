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


def arrivals(
    rate: float, seconds: float, context: int, seed: int = 0, begin_s: float = BEGIN_S
) -> list[Arrival]:
    """`rate` requests a second for `seconds`: of the trace from `begin_s` on each is as likely to be kept, so that its
    bursts stay. More than it has come from a longer time of it, which passes as many times as fast. The same arguments
    give the same requests."""
    trace, speed, count = _rows(), 1, max(1, round(rate * seconds))
    while count > len(rows := _within(trace, begin_s, speed * seconds)):
        if trace[-1].at_s < begin_s + speed * seconds:
            raise ValueError(
                f"the trace has {len(rows)} requests, fewer than {rate:g} a second for {seconds:g} s"
            )
        speed += 1
    kept, scale = random.Random(seed).sample(rows, count), context / LONGEST
    return [
        Arrival(
            (row.at_s - begin_s) / speed,
            max(2, round(row.prompt_tokens * scale)),
            max(2, round(row.output_tokens * scale)),
        )
        for row in sorted(kept, key=lambda row: row.at_s)
    ]


def _within(trace: list[Arrival], begin_s: float, seconds: float) -> list[Arrival]:
    return [row for row in trace if begin_s <= row.at_s < begin_s + seconds]


def _rows() -> list[Arrival]:
    with TRACE.open() as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        Arrival((time - times[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for time, row in zip(times, rows, strict=True)
    ]
