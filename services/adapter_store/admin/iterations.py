"""What one worker's iterations were made of: the last minute in slots of time, and the numbers of now."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from operator import gt

from services.adapter_store.admin.formats import compact, milliseconds, percent
from shared.messages import WorkerStatus
from shared.queue import Iterations

SLOT_S = 0.5
NUM_SLOTS = 120
WINDOW_S = SLOT_S * NUM_SLOTS
RATE_S = 5.0  # tokens per second are of the last so many
STEADY_S = 2.0  # batches of a worker that computes come at least so often
KINDS = {
    "decode": "decode_tokens",
    "prefill": "prefill_tokens",
    "forward": "forward_tokens",
    "backward": "backward_tokens",
}
Column = list[float | None]


@dataclass(frozen=True, slots=True)
class Span:
    """The iterations [start, end) of those that were read. An empty one has no means."""

    columns: dict[str, list[float]]
    start: int
    end: int

    def sum(self, name: str) -> float:
        return sum(self.columns[name][self.start : self.end])

    def mean(self, name: str) -> float:
        return self.sum(name) / (self.end - self.start)

    @property
    def total_ms(self) -> float:
        return self.sum("forward_ms") + self.sum("steps_ms") + self.sum("optimizer_ms")

    @property
    def finetune_tokens_share(self) -> float | None:
        """Tokens of finetuning's forwards and backwards of all tokens that were computed."""
        finetune = self.sum("forward_tokens") + self.sum("backward_tokens")
        return ratio(finetune, finetune + self.sum("decode_tokens") + self.sum("prefill_tokens"))

    @property
    def finetune_time_share(self) -> float | None:
        """Its steps, its updates, and of the fused forward what its rows are of all rows."""
        return ratio(self.sum("finetuning_ms"), self.total_ms)


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def slots(iterations: Iterations, total_blocks: int) -> dict[str, Column]:
    """Means over the iterations that ended in each slot; else of the one that was under way; else None.

    `at` is the middle of a slot. Slots stand at whole multiples of their width, so that the next reading shows
    the same ones.
    """
    last = math.floor(iterations.now_s / SLOT_S)
    edges = [(last - NUM_SLOTS + 1 + i) * SLOT_S for i in range(NUM_SLOTS + 1)]
    bounds = [bisect_left(iterations.at_s, edge) for edge in edges]
    columns: dict[str, Column] = {"at": [edge + SLOT_S / 2 for edge in edges[:-1]]}
    for edge, (start, end) in zip(edges, pairwise(bounds), strict=False):
        if start == end < len(iterations.at_s) and began_s(iterations, end) < edge + SLOT_S / 2:
            end += 1
        span = Span(iterations.columns, start, end) if end > start else None
        for name, value in measure(span, total_blocks).items():
            columns.setdefault(name, []).append(None if value is None else round(value, 3))
    return columns


def began_s(iterations: Iterations, index: int) -> float:
    return iterations.at_s[index] - Span(iterations.columns, index, index + 1).total_ms / 1000


def measure(span: Span | None, total_blocks: int) -> dict[str, float | None]:
    if span is None:
        return dict.fromkeys(MEASURES)
    used_blocks = total_blocks - span.mean("free_blocks")
    values = (
        *(span.mean(column) for column in KINDS.values()),
        span.total_ms / (span.end - span.start),
        span.mean("predicted_ms"),
        span.mean("limit_ms"),
        span.finetune_tokens_share,
        span.finetune_time_share,
        span.mean("running"),
        span.mean("waiting"),
        ratio(used_blocks, total_blocks),
    )
    return dict(zip(MEASURES, values, strict=True))


MEASURES = (
    *KINDS,
    "ms",
    "predicted_ms",
    "limit_ms",
    "tokens_share",
    "time_share",
    "running",
    "waiting",
    "kv",
)


def figures(iterations: Iterations) -> dict[str, str]:
    """The numbers beside the pictures, in words; a rate is of the last few seconds, the rest of the minute."""
    columns, count = iterations.columns, len(iterations.at_s)
    now_s = iterations.now_s
    if iterations.heard_s is not None and now_s - iterations.heard_s < STEADY_S:
        now_s = iterations.heard_s  # what has ended since is still on its way
    recent = Span(columns, bisect_left(iterations.at_s, now_s - RATE_S), count)
    rates = {kind: compact(recent.sum(column) / RATE_S) for kind, column in KINDS.items()}
    parts = zip(columns["forward_ms"], columns["steps_ms"], columns["optimizer_ms"], strict=True)
    totals = [sum(each) for each in parts]
    num_exceeded = sum(map(gt, totals, columns["predicted_ms"]))
    minute = Span(columns, 0, count)
    return rates | {
        "iterations": compact((count - recent.start) / RATE_S),
        "p50": milliseconds(quantile(totals, 0.5)),
        "p99": milliseconds(quantile(totals, 0.99)),
        "exceeded": percent(ratio(num_exceeded, count)),
        "tokens_share": percent(minute.finetune_tokens_share),
        "time_share": percent(minute.finetune_time_share),
        "jobs": compact(columns["jobs"][-1] if count else None),
        "dropped": f"{iterations.num_dropped:,}" if iterations.num_dropped else "",
    }


def accuracy(worker: WorkerStatus | None) -> dict[str, str]:
    """How far the worker's predictions are off; the plan has a margin beyond them."""
    if worker is None or not worker.latency_error_p50:
        return {}
    return {"error": percent(worker.latency_error_p50), "error_p95": percent(worker.latency_error_p95)}


def quantile(values: list[float], q: float) -> float | None:
    """The smallest value that at least `q` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else None
