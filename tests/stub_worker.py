"""A worker without an engine: speaks the real queue protocol, and its tokens are a function of the request.

Any lost, doubled or swapped token shows, because the reference answer is known without running anything.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import redis

from shared.config import Settings
from shared.messages import GenerateRequest, RequestMeta, TierAttainment, TokenLogprob, WorkerStatus
from shared.queue import Claimed, Emission, InferenceWorkerQueue, open_redis

Answer = Callable[[GenerateRequest], list[int]]


def reference_tokens(request: GenerateRequest) -> list[int]:
    """`max_tokens` numbers below 256 that only this request has."""
    rid = request.request_id
    return [zlib.crc32(f"{rid}/{i}".encode()) % 256 for i in range(request.sampling.max_tokens)]


@dataclass
class Running:
    claimed: Claimed
    answer: list[int]
    num_emitted: int
    sent_meta: bool = False


@dataclass
class StubWorker:
    """`step` is one iteration: take, emit one chunk of every running request, beat when due."""

    url: str
    settings: Settings
    worker_id: str
    answer: Answer = reference_tokens
    slots: int = 4
    tokens_per_step: int = 1
    step_s: float = 0.0
    fail_with: str | None = None  # each request ends with this error ...
    fail_after: int = 0  # ... after so many tokens
    memory_bytes: dict[str, int] = field(default_factory=dict)
    service_levels: dict[str, TierAttainment] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    results: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queue = InferenceWorkerQueue(open_redis(self.url), self.settings, self.worker_id)
        self.stopping = threading.Event()
        self.next_beat = 0.0

    def step(self) -> None:
        self.take()
        self.emit()
        if time.monotonic() >= self.next_beat:
            self.beat()

    def take(self) -> list[Claimed]:
        claims = self.queue.take(self.slots - len(self.running))
        for claimed in claims:
            answer = self.answer(claimed.request)
            self.running[claimed.request_id] = Running(claimed, answer, len(claimed.emitted_tokens))
        return claims

    def emit(self) -> None:
        batch = [(item, self.emission(item)) for item in self.running.values()]
        if not batch:
            return
        results = self.queue.emit([emission for _, emission in batch])
        for (item, emission), result in zip(batch, results, strict=True):
            self.results.append(result)
            self.settle(item, emission, result)

    def settle(self, item: Running, emission: Emission, result: str) -> None:
        if result.startswith("behind:"):
            item.num_emitted = int(result.removeprefix("behind:"))
            return
        item.num_emitted += len(emission.tokens)
        item.sent_meta = True
        if result != "ok" or emission.finish:
            self.running.pop(item.claimed.request_id, None)

    def emission(self, item: Running) -> Emission:
        start = item.num_emitted
        if self.fail_with is not None and start >= self.fail_after:
            return Emission(item.claimed, start, finish="error", error=self.fail_with)
        tokens = item.answer[start : start + self.tokens_per_step]
        is_last = start + len(tokens) >= len(item.answer)
        sampling = item.claimed.request.sampling
        finish = "length" if len(item.answer) >= sampling.max_tokens else "stop"
        return Emission(
            item.claimed,
            start,
            tokens,
            finish=finish if is_last else None,
            logprobs=[logprob_of(t, sampling.logprobs) for t in tokens]
            if sampling.logprobs is not None
            else None,
            meta=None if item.sent_meta else self.meta(item.claimed.request),
        )

    def meta(self, request: GenerateRequest) -> RequestMeta:
        if request.sampling.prompt_logprobs is None:
            return RequestMeta(cached_tokens=1)
        top = request.sampling.prompt_logprobs
        rest = [logprob_of(token, top) for token in request.prompt[1:]]
        return RequestMeta(cached_tokens=1, prompt_logprobs=(None, *rest))

    def beat(self) -> None:
        status = WorkerStatus(
            worker_id=self.worker_id,
            running=len(self.running),
            memory_bytes=self.memory_bytes,
            memory_limit_bytes=1000,
            service_levels=self.service_levels,
        )
        for rid in self.queue.beat([r.claimed for r in self.running.values()], status):
            self.running.pop(rid, None)
        self.next_beat = time.monotonic() + self.settings.beat_s

    def run(self) -> None:
        """Until `stopping`; survives Redis going away."""
        while not self.stopping.is_set():
            try:
                self.step()
                if not self.running:
                    self.queue.wait(0.02)
            except redis.RedisError:
                time.sleep(0.05)
            time.sleep(self.step_s)

    def __enter__(self) -> StubWorker:
        self.thread = threading.Thread(target=self.run, name=self.worker_id, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join()


def logprob_of(token: int, num_top: int) -> TokenLogprob:
    """The token itself leads, then its neighbours; all values are exact in binary."""
    top = tuple((abs(token - i), -0.5 - i) for i in range(num_top))
    return TokenLogprob(logprob=-0.5, top=top)
