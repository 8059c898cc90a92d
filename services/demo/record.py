"""What the demo sees, kept for its live line, its table and its picture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class Completed:
    """One chat request of the traffic."""

    ended_s: float
    ttft_s: float
    tpot_ms: float
    num_tokens: int


@dataclass(slots=True)
class Sample:
    """Tokens that the worker has processed up to a time."""

    at_s: float
    inference: int
    finetune: float


@dataclass(slots=True)
class Record:
    """Everything that was seen, for the live line, the table and the picture. Times are monotonic."""

    started_s: float = field(default_factory=time.monotonic)
    completed: list[Completed] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # by job: (step, loss)
    total_steps: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.spans[name] = begin, time.monotonic()

    def tpots(self, begin_s: float, end_s: float) -> list[float]:
        return [c.tpot_ms for c in self.completed if begin_s <= c.ended_s <= end_s and c.num_tokens > 1]

    def rates(self, begin_s: float, end_s: float) -> tuple[float, float]:
        """Inference and finetuning tokens per second over a stretch of time."""
        inside = [s for s in self.samples if begin_s <= s.at_s <= end_s]
        if len(inside) < 2:
            return 0.0, 0.0
        first, last = inside[0], inside[-1]
        elapsed = last.at_s - first.at_s
        return (last.inference - first.inference) / elapsed, (last.finetune - first.finetune) / elapsed

    def training_span(self, name: str) -> tuple[float, float]:
        """The part of a span in which the finetuned tokens went up: without evaluations at its ends."""
        begin, end = self.spans[name]
        inside = [s for s in self.samples if begin <= s.at_s <= end]
        moving = [b for a, b in pairwise(inside) if b.finetune > a.finetune]
        return (moving[0].at_s, moving[-1].at_s) if len(moving) > 1 else (begin, end)
