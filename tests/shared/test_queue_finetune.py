"""The finetune queue carries job ids at least once."""

from __future__ import annotations

import pytest
import redis

from shared.config import Settings
from shared.queue import FinetuneQueue, FinetuneSender, open_async_redis, open_redis


@pytest.fixture
def timers(redis_url: str) -> Settings:
    return Settings(redis_url=redis_url, lease_s=30)


@pytest.fixture
def server(redis_url: str) -> redis.Redis:
    return open_redis(redis_url)


async def test_a_job_is_taken_once_and_gone_after_its_acknowledgement(timers, server) -> None:
    await FinetuneSender(open_async_redis(timers.redis_url)).send("ftjob-1")
    first, second = (FinetuneQueue(server, timers, name) for name in ("a", "b"))
    entry_id, job_id = first.take()
    assert job_id == "ftjob-1"
    assert second.take() is None
    first.ack(entry_id)
    assert server.xlen("fx:{ft}:q") == 0


def test_what_a_dead_worker_took_comes_back(timers, server) -> None:
    FinetuneQueue(server, timers).send("ftjob-1")
    assert FinetuneQueue(server, timers, "dead").take() is not None
    impatient = timers.model_copy(update={"lease_s": 0.0})
    taken = FinetuneQueue(server, impatient, "next").take()
    assert taken is not None
    assert taken[1] == "ftjob-1"


def test_an_emptied_redis_is_an_empty_queue(timers, server) -> None:
    queue = FinetuneQueue(server, timers, "a")
    assert queue.take() is None
    queue.send("ftjob-1")
    server.flushall()
    assert queue.take() is None
    queue.send("ftjob-2")
    taken = queue.take()
    assert taken is not None
    assert taken[1] == "ftjob-2"
