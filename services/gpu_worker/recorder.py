"""Tells what each iteration was made of to whoever watches, in batches, beside the loop."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

import redis
import structlog

from services.gpu_worker.engine.events import IterationStats
from shared.queue import IterationBatch, IterationSender
from shared.queue.iterations import MAX_ITERATIONS

log = structlog.get_logger()
PERIOD_S = 0.5


@dataclass(frozen=True, slots=True)
class Record:
    ended_s: float  # time.monotonic
    stats: IterationStats
    num_jobs: int


class Recorder(threading.Thread):
    """`add` never waits and holds a bounded number of iterations; what cannot be sent is counted and let go."""

    def __init__(self, sender: IterationSender, period_s: float = PERIOD_S) -> None:
        super().__init__(name="recorder", daemon=True)
        self._sender = sender
        self._period_s = period_s
        self._lock = threading.Lock()
        self._waiting: deque[Record] = deque(maxlen=MAX_ITERATIONS)
        self._num_dropped = 0  # since the last batch that arrived
        self._is_cut_off = False
        self._stopping = threading.Event()

    def add(self, stats: IterationStats, num_jobs: int) -> None:
        """An iteration that has just ended beside so many jobs in training; one that computed nothing is none."""
        if not stats.timing.total_ms:
            return
        with self._lock:
            self._num_dropped += len(self._waiting) == MAX_ITERATIONS
            self._waiting.append(Record(time.monotonic(), stats, num_jobs))

    def run(self) -> None:
        while not self._stopping.wait(self._period_s):
            self.flush()
        self.flush()

    def flush(self) -> None:
        with self._lock:
            records, self._waiting = self._waiting, deque(maxlen=MAX_ITERATIONS)
            num_dropped, self._num_dropped = self._num_dropped, 0
        if not records:
            self._count(num_dropped)
            return
        try:
            self._sender.send(make_batch(records, time.monotonic(), num_dropped))
        except redis.RedisError as error:
            self._count(num_dropped + len(records))
            if not self._is_cut_off:
                log.warning("record_failed", error=str(error))
            self._is_cut_off = True
        else:
            self._is_cut_off = False

    def _count(self, num_dropped: int) -> None:
        with self._lock:
            self._num_dropped += num_dropped

    def stop(self, timeout_s: float) -> None:
        """Sends what is left, if that is quick."""
        self._stopping.set()
        self.join(timeout_s)


def make_batch(records: Collection[Record], now_s: float, num_dropped: int) -> IterationBatch:
    stats = [record.stats for record in records]
    return IterationBatch(
        age_ms=tuple(round((now_s - record.ended_s) * 1000, 1) for record in records),
        decode_tokens=tuple(each.num_decode_tokens for each in stats),
        prefill_tokens=tuple(each.num_prefill_tokens for each in stats),
        forward_tokens=tuple(round(each.num_forward_tokens, 2) for each in stats),
        backward_tokens=tuple(round(each.num_backward_tokens, 2) for each in stats),
        limit_ms=tuple(milliseconds(each.limit_ms) for each in stats),
        predicted_ms=tuple(milliseconds(each.predicted_ms) for each in stats),
        forward_ms=tuple(milliseconds(each.timing.forward_ms) for each in stats),
        steps_ms=tuple(milliseconds(each.timing.steps_ms) for each in stats),
        optimizer_ms=tuple(milliseconds(each.timing.optimizer_ms) for each in stats),
        finetuning_ms=tuple(milliseconds(each.finetuning_ms) for each in stats),
        running=tuple(each.num_running for each in stats),
        waiting=tuple(each.num_waiting for each in stats),
        free_blocks=tuple(each.num_free_blocks for each in stats),
        jobs=tuple(record.num_jobs for record in records),
        num_dropped=num_dropped,
    )


def milliseconds(value: float) -> float:
    """To a hundredth; 0 for what is not finite: JSON has no word for it."""
    return round(value, 2) if math.isfinite(value) else 0.0
