"""Iterations on their way from the worker's loop to whoever watches, over a real Redis."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from services.embedded import EmbeddedRedis
from services.gpu_worker.engine.batch import Timing
from services.gpu_worker.engine.events import IterationStats
from services.gpu_worker.recorder import Recorder
from shared.queue import IterationBatch, IterationSender, open_async_redis, open_redis, read_iterations
from shared.queue.iterations import MAX_BATCHES, MAX_ITERATIONS, TTL_S, Iterations, stream_key


def make_stats(decodes: int = 1, total_ms: float = 10.0) -> IterationStats:
    return IterationStats(decodes, 2, 3, 4.5, 50.0, 9.0, Timing(total_ms, 0.0, 0.0), 0.0, 5, 6, 7)


def make_recorder(url: str, period_s: float = 0.02, worker_id: str = "w") -> Recorder:
    return Recorder(IterationSender(open_redis(url), worker_id), period_s)


async def read(url: str, worker_id: str = "w", window_s: float = 60.0) -> Iterations:
    async with open_async_redis(url) as client:
        return await read_iterations(client, worker_id, window_s)


async def test_each_iteration_arrives_once_in_order_and_at_its_time(redis_url: str) -> None:
    recorder = make_recorder(redis_url)
    recorder.start()
    for i in range(50):
        recorder.add(make_stats(decodes=i), num_jobs=2)
        await asyncio.sleep(0.002)
    recorder.stop(timeout_s=5.0)
    found = await read(redis_url)
    assert found.columns["decode_tokens"] == list(range(50))
    assert set(found.columns["backward_tokens"]) == {4.5} and set(found.columns["jobs"]) == {2}
    assert set(found.columns["forward_ms"]) == {10.0} and set(found.columns["free_blocks"]) == {7}
    assert found.at_s == sorted(found.at_s)
    assert 0.09 < found.at_s[-1] - found.at_s[0] < found.now_s - found.at_s[0] < 5.0
    assert found.num_dropped == 0


async def test_an_iteration_that_computed_nothing_is_not_told(redis_url: str) -> None:
    recorder = make_recorder(redis_url)
    recorder.add(IterationStats(), num_jobs=1)
    recorder.flush()
    assert (await read(redis_url)).heard_s is None


async def test_the_stream_stays_short_and_vanishes_after_its_worker(redis_url: str) -> None:
    recorder = make_recorder(redis_url)
    for _ in range(MAX_BATCHES + 250):
        recorder.add(make_stats(), num_jobs=0)
        recorder.flush()
    with open_redis(redis_url) as client:
        assert MAX_BATCHES <= client.xlen(stream_key("w")) <= MAX_BATCHES + 150  # Redis trims whole nodes
        assert 0 < client.ttl(stream_key("w")) <= TTL_S
    assert len((await read(redis_url)).at_s) == MAX_BATCHES


def test_an_outage_costs_records_but_neither_time_nor_memory(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        url = server.url
    recorder = make_recorder(url)
    recorder.start()
    began = time.monotonic()
    for _ in range(20 * MAX_ITERATIONS):
        recorder.add(make_stats(), num_jobs=1)
    assert time.monotonic() - began < 1.0
    assert len(recorder._waiting) <= MAX_ITERATIONS
    recorder.stop(timeout_s=10.0)
    assert not recorder.is_alive()


async def test_after_an_outage_the_next_batch_says_how_many_are_missing(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_redis(redis_url)
    recorder = Recorder(IterationSender(client, "w"))
    recorder.add(make_stats(1), num_jobs=1)
    recorder.flush()
    with open_redis(redis_url) as other:
        other.config_set("maxmemory", "1")  # writes are refused
        for _ in range(MAX_ITERATIONS + 30):
            recorder.add(make_stats(2), num_jobs=1)
        recorder.flush()
        recorder.flush()
        other.config_set("maxmemory", "0")
    assert (await read(redis_url)).num_dropped == 0
    recorder.add(make_stats(3), num_jobs=1)
    recorder.flush()
    found = await read(redis_url)
    assert found.columns["decode_tokens"] == [1, 3]
    assert found.num_dropped == MAX_ITERATIONS + 30


async def test_batches_of_other_versions_are_read_as_far_as_they_are_understood(redis_url: str) -> None:
    with open_redis(redis_url) as client:
        for text in (
            '{"age_ms": [20, 0], "decode_tokens": [1, 2], "novelty": [1, 2]}',  # older and newer at once
            '{"age_ms": [0], "decode_tokens": [1, 2]}',  # columns of unequal length
            "not JSON",
        ):
            client.xadd(stream_key("w"), {"batch": text})
        client.xadd(stream_key("w"), {"another": "field"})
    found = await read(redis_url)
    assert found.columns["decode_tokens"] == [1, 2] and found.columns["limit_ms"] == [0, 0]


async def test_only_the_window_that_was_asked_for_is_read(redis_url: str) -> None:
    with open_redis(redis_url) as client:
        sender = IterationSender(client, "w")
        sender.send(IterationBatch(age_ms=(5000.0, 900.0, 0.0), decode_tokens=(1, 2, 3)))
    assert (await read(redis_url, window_s=2.0)).columns["decode_tokens"] == [2, 3]
    assert (await read(redis_url, worker_id="another")).at_s == []


def test_recording_costs_less_than_a_percent_of_a_step_of_a_millisecond(redis_url: str) -> None:
    """The loop's share only; some microseconds here, with room for a machine that is busy."""
    recorder, stats = make_recorder(redis_url), make_stats()
    took_s = []
    for _ in range(50):
        began = time.perf_counter()
        for _ in range(100):
            recorder.add(stats, num_jobs=1)
        took_s.append((time.perf_counter() - began) / 100)
    assert min(took_s) < 10e-6
