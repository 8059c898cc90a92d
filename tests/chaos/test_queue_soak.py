"""Workers that vanish, freeze beyond their lease and hand over; a Redis that forgets; cancelled clients.

Whatever happens, a request's client gets exactly its reference tokens, each once, and one terminal.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import redis

from services.embedded import EmbeddedRedis
from shared.config import Settings
from shared.messages import GenerateRequest, SamplingParams
from shared.queue import InferenceClient, open_async_redis, open_redis
from tests.stub_worker import StubWorker, reference_tokens

NUM_REQUESTS = 120
NUM_WORKERS = 4


class Chaos:
    """Runs one worker after another in its slot; each ends in its own way."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.stopping = threading.Event()
        self.faults: Counter[str] = Counter()
        self.results: Counter[str] = Counter()
        self.threads = [
            threading.Thread(target=self.run_slot, args=(slot, random.Random(seed * 100 + slot)), daemon=True)
            for slot in range(NUM_WORKERS)
        ]

    def run_slot(self, slot: int, rng: random.Random) -> None:
        for life in range(10_000):
            worker = StubWorker(self.settings.redis_url, self.settings, f"w{slot}.{life}", slots=8)
            while not self.stopping.is_set() and self.live(worker, rng):
                time.sleep(0.003)
            self.results.update(result.split(":")[0] for result in worker.results)
            if self.stopping.is_set():
                return

    def live(self, worker: StubWorker, rng: random.Random) -> bool:
        """One step; False when the worker is gone."""
        draw = rng.random()
        try:
            if draw < 0.004:
                self.faults["vanished"] += 1
                return False
            if draw < 0.006:
                self.faults["vanished between take and emit"] += 1
                worker.take()
                return False
            if draw < 0.009:
                self.faults["vanished after emit, before its reply was read"] += 1
                worker.queue.emit([worker.emission(item) for item in worker.running.values()])
                return False
            if draw < 0.012:
                self.faults["handed over"] += 1
                worker.queue.release([item.claimed for item in worker.running.values()])
                worker.queue.retire()
                return False
            if draw < 0.015:
                self.faults["froze beyond the lease"] += 1
                time.sleep(2 * self.settings.lease_s)
            if draw < 0.04:
                self.faults["emitted twice"] += 1
                worker.queue.emit([worker.emission(item) for item in worker.running.values()])
            worker.step()
        except redis.RedisError:
            self.faults["lost the connection"] += 1
            time.sleep(0.02)
        return True

    def __enter__(self) -> Chaos:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_request_gets_exactly_its_tokens_under_chaos(redis_url: str, seed: int) -> None:
    settings = Settings(
        redis_url=redis_url, lease_s=0.15, reap_s=0.05, beat_s=0.04, owner_no_progress_s=0.4, api_ttl_s=10
    )
    rng = random.Random(seed)
    server = open_redis(redis_url)
    clients = [InferenceClient(open_async_redis(redis_url), settings, f"api-{i}") for i in range(2)]
    async with clients[0], clients[1]:
        with Chaos(settings, seed) as chaos:
            requests = [make_request(seed, i, rng) for i in range(NUM_REQUESTS)]
            cancelled = set(rng.sample(range(NUM_REQUESTS), 10))
            async with asyncio.TaskGroup() as group:
                answers = [
                    group.create_task(consume(clients[i % 2], request, 0.3 * rng.random(), i in cancelled))
                    for i, request in enumerate(requests)
                ]
                group.create_task(forget_everything(server, 0.5))
            await until_empty(server)
    for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        expected = reference_tokens(request)
        if i in cancelled:
            assert answer.result() == expected[: len(answer.result())]
        else:
            assert answer.result() == expected, request.request_id
    assert chaos.results["stale"] > 0
    assert chaos.faults.total() > 20, chaos.faults


async def test_a_killed_redis_loses_no_request(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        settings = Settings(redis_url=server.url, lease_s=0.5, reap_s=0.1, beat_s=0.1, owner_no_progress_s=1)
        rng = random.Random(3)
        requests = [make_request(3, i, rng) for i in range(20)]
        async with InferenceClient(open_async_redis(server.url), settings, "api") as client:
            with StubWorker(server.url, settings, "w", slots=32, step_s=0.01):
                answers = [asyncio.create_task(consume(client, request, 0, False)) for request in requests]
                for _ in range(3):
                    await asyncio.sleep(0.15)
                    await asyncio.to_thread(kill_and_restart, server)
                got = await asyncio.gather(*answers)
    assert got == [reference_tokens(request) for request in requests]


def kill_and_restart(server: EmbeddedRedis) -> None:
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    server.launch()


def make_request(seed: int, number: int, rng: random.Random) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"soak-{seed}-{number}",
        tenant_id="t",
        prompt=(1,),
        sampling=SamplingParams(max_tokens=rng.randint(1, 120)),
        service_tier=rng.choice(["priority", "default", "flex"]),
    )


async def consume(
    client: InferenceClient, request: GenerateRequest, delay_s: float, cancel: bool
) -> list[int]:
    """The tokens as a client sees them; frames must follow each other without a gap."""
    await asyncio.sleep(delay_s)
    await client.enqueue(request)
    tokens: list[int] = []
    finish = None
    stream = client.stream(request)
    async for frame in stream:
        assert finish is None
        assert frame.from_seq == len(tokens)
        tokens += frame.tokens
        finish = frame.finish
        if cancel and len(tokens) > 3:
            await stream.aclose()
            return tokens
    assert finish == "length"
    return tokens


async def forget_everything(server: redis.Redis, delay_s: float) -> None:
    await asyncio.sleep(delay_s)
    await asyncio.to_thread(server.flushall)


async def until_empty(server: redis.Redis) -> None:
    """Lanes return to nothing: no entry is left behind."""
    for _ in range(200):
        if sum(server.xlen(f"fx:{{inf}}:q:{lane}") for lane in ("hi", "std", "batch")) == 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("entries were left in the lanes")
