"""The worker's side of the inference queue: take, emit, beat, release.

Synchronous. One thread may emit while another does the rest.

Every call may raise `redis.RedisError`; each may then be repeated as it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson
import redis
from pydantic import ValidationError

from shared.config import Settings
from shared.messages import FinishReason, GenerateRequest, RequestMeta, TokenLogprob, WorkerStatus
from shared.queue.connection import KEY_PREFIX, LANES, Argument, Lane, script

MAX_DELIVERIES_WITHOUT_PROGRESS = 3
FLOOR_EVERY = 10  # one take in ten begins with a lower lane, so that no lane starves


@dataclass(frozen=True, slots=True)
class Claimed:
    """A request, ours under this attempt. Continue after `emitted_tokens`, which its client has already."""

    request: GenerateRequest
    attempt: int
    api_id: str
    emitted_tokens: tuple[int, ...] = ()
    waited_s: float = 0.0  # since the first enqueue

    @property
    def request_id(self) -> str:
        return self.request.request_id


@dataclass(frozen=True, slots=True)
class Emission:
    """What one step computed for one request. Without tokens and finish it asks whether to go on."""

    claimed: Claimed
    from_seq: int
    tokens: Sequence[int] = ()
    finish: FinishReason | None = None
    error: str | None = None
    logprobs: Sequence[TokenLogprob] | None = None  # one per token, where asked for
    meta: RequestMeta | None = None


class InferenceWorkerQueue:
    """`worker_id` must be new at every start of a process: it is half of the fence."""

    def __init__(self, client: redis.Redis, settings: Settings, worker_id: str) -> None:
        self._client = client
        self._settings = settings
        self.worker_id = worker_id
        self._num_takes = 0
        self._next_reap = 0.0
        self._tails: dict[Lane, str] = {}

    def take(self, free_slots: int) -> list[Claimed]:
        """Claims up to `free_slots` requests; never waits. Leases that are over come before new entries.

        A claim of a request that this worker still runs (it failed to beat in time) replaces the old one.
        """
        if free_slots <= 0:
            return []
        now = time.monotonic()
        reap = now >= self._next_reap
        lanes = self._lane_order()
        lease_ms = int(self._settings.lease_s * 1000)
        claims, tails = script("take").run(
            self._client,
            *(self.worker_id, free_slots, lease_ms, int(reap), MAX_DELIVERIES_WITHOUT_PROGRESS),
            *lanes,
        )
        if reap and len(claims) < free_slots:
            self._next_reap = now + self._settings.reap_s
        self._tails = dict(zip(lanes, tails, strict=False))
        return [claimed for claim in claims if (claimed := self._parse(*claim)) is not None]

    def wait(self, timeout_s: float) -> bool:
        """After a take that gave nothing: blocks until a request arrives, at most `timeout_s` (or 3 s)."""
        if not self._tails:
            return True
        streams = {f"{KEY_PREFIX}q:{lane}": tail for lane, tail in self._tails.items()}
        block_ms = min(max(1, int(timeout_s * 1000)), 3000)  # 0 would mean "for ever"
        return bool(self._client.xread(streams, count=1, block=block_ms))  # type: ignore[arg-type]

    def emit(self, emissions: Sequence[Emission]) -> list[str]:
        """Publishes one step. For each: 'ok'; 'stale' or 'cancel': drop the sequence, its end is told or
        another worker has it; 'behind:n': the log was cut, emit again from token n.
        """
        by_api: dict[str, list[int]] = {}
        for i, emission in enumerate(emissions):
            by_api.setdefault(emission.claimed.api_id, []).append(i)
        calls: list[Sequence[Argument]] = [
            (self.worker_id, api_id, orjson.dumps([pack(emissions[i]) for i in indices]).decode())
            for api_id, indices in by_api.items()
        ]
        replies = script("emit").run_many(self._client, calls)
        results = [""] * len(emissions)
        for indices, reply in zip(by_api.values(), replies, strict=True):
            for i, result in zip(indices, reply, strict=True):
                results[i] = result
        return results

    def beat(self, running: Iterable[Claimed], status: WorkerStatus) -> list[str]:
        """Renews the leases and reports; returns the ids of requests to drop. Call it only while the engine
        makes progress: a worker that hangs must lose its leases.
        """
        ttl_s = int(self._settings.worker_ttl_s) or 1
        args = fences(running)
        return list(script("beat").run(self._client, self.worker_id, ttl_s, status.model_dump_json(), *args))

    def release(self, running: Iterable[Claimed]) -> None:
        """Hands requests back, to be continued by another worker at once."""
        script("release").run(self._client, self.worker_id, *fences(running))

    def retire(self) -> None:
        """The last call of a worker that drained."""
        script("retire").run(self._client, self.worker_id, *LANES)

    def _lane_order(self) -> tuple[Lane, ...]:
        self._num_takes += 1
        turn = self._num_takes % FLOOR_EVERY
        if turn == 0:
            return ("batch", "std", "hi")
        return ("std", "hi", "batch") if turn == FLOOR_EVERY // 2 else LANES

    def _parse(
        self, rid: str, attempt: int, api_id: str, payload: str, tokens: list[str], remaining_ms: int
    ) -> Claimed | None:
        """None for a payload of an incompatible peer; it is refused in its owner's name."""
        try:
            request = GenerateRequest.model_validate_json(payload)
        except ValidationError:
            item = [rid, attempt, len(tokens), [], "error", "bad_payload", [], ""]
            script("emit").run(self._client, self.worker_id, api_id, orjson.dumps([item]).decode())
            return None
        waited_s = max(0.0, request.deadline_s - remaining_ms / 1000)
        return Claimed(request, attempt, api_id, tuple(map(int, tokens)), waited_s)


def fences(running: Iterable[Claimed]) -> list[Argument]:
    return [part for claimed in running for part in (claimed.request_id, claimed.attempt)]


def pack(emission: Emission) -> list[object]:
    """An item of emit.lua. Logprobs and meta travel as JSON texts that Lua never opens."""
    return [
        emission.claimed.request_id,
        emission.claimed.attempt,
        emission.from_seq,
        list(emission.tokens),
        emission.finish or "",
        emission.error or "",
        [logprob.model_dump_json() for logprob in emission.logprobs or ()],
        emission.meta.model_dump_json() if emission.meta else "",
    ]
