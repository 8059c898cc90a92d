"""What a worker's latest iterations were made of, for whoever watches: one short stream a worker.

Nothing depends on it: a worker that cannot write goes on without, and the stream vanishes soon after its worker.
Times are the server's: the id of an entry says when a batch arrived, the batch how long before that each of its
iterations had ended.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Self

import redis
import redis.asyncio
from pydantic import Field, ValidationError, model_validator
from redis.exceptions import RedisError

from shared.messages import Message
from shared.queue.client import QueueUnavailable
from shared.queue.connection import KEY_PREFIX

MAX_BATCHES = 160  # kept in Redis; at one every half second more than a minute
MAX_ITERATIONS = 512  # of one batch
TTL_S = 120


class IterationBatch(Message):
    """Iterations in the order they ended, as columns of equal length; an unknown column is empty."""

    age_ms: tuple[float, ...] = Field(
        min_length=1, max_length=MAX_ITERATIONS
    )  # since its end, at the sending
    decode_tokens: tuple[int, ...] = ()
    prefill_tokens: tuple[int, ...] = ()
    forward_tokens: tuple[float, ...] = ()  # of finetuning; token-layers / layers
    backward_tokens: tuple[float, ...] = ()
    limit_ms: tuple[float, ...] = ()  # 0: none, or somebody is late already
    predicted_ms: tuple[float, ...] = ()  # with the margin that it was planned with
    forward_ms: tuple[float, ...] = ()
    steps_ms: tuple[float, ...] = ()
    optimizer_ms: tuple[float, ...] = ()
    finetuning_ms: tuple[float, ...] = ()  # of these three
    running: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    free_blocks: tuple[int, ...] = ()
    jobs: tuple[int, ...] = ()  # in training
    num_dropped: int = Field(default=0, ge=0)  # iterations since the last batch that no batch tells of

    @model_validator(mode="after")
    def check_lengths(self) -> Self:
        for name in COLUMNS:
            if len(getattr(self, name)) not in (0, len(self.age_ms)):
                raise ValueError(
                    f"{len(getattr(self, name))} values of {name}, {len(self.age_ms)} iterations"
                )
        return self


COLUMNS = tuple(name for name in IterationBatch.model_fields if name not in ("age_ms", "num_dropped"))


def stream_key(worker_id: str) -> str:
    return f"{KEY_PREFIX}it:{worker_id}"


class IterationSender:
    """For a worker's thread. `send` may raise `redis.RedisError`."""

    def __init__(self, client: redis.Redis, worker_id: str) -> None:
        self._client = client
        self._key = stream_key(worker_id)

    def send(self, batch: IterationBatch) -> None:
        pipeline = self._client.pipeline(transaction=False)
        pipeline.xadd(self._key, {"batch": batch.model_dump_json()}, maxlen=MAX_BATCHES)
        pipeline.expire(self._key, TTL_S)
        pipeline.execute()


@dataclass(slots=True)
class Iterations:
    """Of one worker, in order of time: columns of equal length, and when each iteration ended."""

    now_s: float  # by the server's clock, as `at_s`
    heard_s: float | None = None  # when the newest batch arrived
    num_dropped: int = 0
    at_s: list[float] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})

    def add(self, arrived_s: float, batch: IterationBatch) -> None:
        last_s = self.at_s[-1] if self.at_s else 0.0
        for age_ms in batch.age_ms:
            last_s = max(last_s, arrived_s - age_ms / 1000)  # a batch that was held up does not reach back
            self.at_s.append(last_s)
        for name, column in self.columns.items():
            column.extend(getattr(batch, name) or (0,) * len(batch.age_ms))
        self.heard_s = arrived_s
        self.num_dropped += batch.num_dropped

    def forget_before(self, start_s: float) -> None:
        first = bisect_left(self.at_s, start_s)
        del self.at_s[:first]
        for column in self.columns.values():
            del column[:first]


async def read_iterations(client: redis.asyncio.Redis, worker_id: str, window_s: float) -> Iterations:
    """Those of the last `window_s` seconds; raises QueueUnavailable. What is not understood is left out."""
    pipeline = client.pipeline(transaction=False)
    pipeline.time()
    pipeline.xrevrange(stream_key(worker_id), count=MAX_BATCHES)
    try:
        (seconds, micros), entries = await pipeline.execute()
    except RedisError as error:
        raise QueueUnavailable(str(error)) from error
    found = Iterations(seconds + micros / 1e6)
    for entry_id, fields in reversed(entries):
        arrived_s = int(entry_id.partition("-")[0]) / 1000
        if arrived_s < found.now_s - window_s:
            continue
        try:
            found.add(arrived_s, IterationBatch.model_validate_json(fields.get("batch", "")))
        except ValidationError:
            continue
    found.forget_before(found.now_s - window_s)
    return found
