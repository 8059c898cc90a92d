"""What was committed reaches the finetune queue, and lost workers lose their jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
import redis.asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import select, update

from services.adapter_store.dispatch import Dispatcher, fail_forgotten, relay, resend_lost
from shared import jobs
from shared.config import Settings
from shared.db import SessionFactory, now
from shared.models import FtJob, Outbox
from shared.queue import FinetuneQueue, FinetuneSender, open_async_redis, open_redis
from shared.queue.finetune import STREAM
from tests.records import claim_job, make_queued_job, make_tenant


@pytest.fixture
async def redis_client(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    client = open_async_redis(settings.redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def sender(redis_client: redis.asyncio.Redis) -> FinetuneSender:
    return FinetuneSender(redis_client)


def take_all(settings: Settings) -> list[str]:
    """Job ids as a worker would take and acknowledge them."""
    queue = FinetuneQueue(open_redis(settings.redis_url), settings, "w1")
    taken = []
    while entry := queue.take():
        queue.ack(entry[0])
        taken.append(entry[1])
    return taken


async def outbox(factory: SessionFactory) -> list[str]:
    async with factory.begin() as session:
        return list(await session.scalars(select(Outbox.key)))


async def age(factory: SessionFactory, column: str, by: timedelta) -> None:
    async with factory.begin() as session:
        await session.execute(update(FtJob).values({column: now() - by}))


async def test_a_queued_job_reaches_the_worker_once(
    session_factory: SessionFactory, sender: FinetuneSender, settings: Settings
) -> None:
    job_id = await make_queued_job(session_factory)
    assert await relay(session_factory, sender) == 1
    assert await relay(session_factory, sender) == 0
    assert take_all(settings) == [job_id]
    assert await outbox(session_factory) == []


async def test_a_job_that_waits_longer_is_not_sent_early(
    session_factory: SessionFactory, sender: FinetuneSender, settings: Settings
) -> None:
    await make_queued_job(session_factory)
    async with session_factory.begin() as session:
        await session.execute(update(Outbox).values(due_at=now() + timedelta(minutes=1)))
    assert await relay(session_factory, sender) == 0
    assert take_all(settings) == []


async def test_a_job_cancelled_before_it_was_sent_is_not_sent(
    session_factory: SessionFactory, sender: FinetuneSender, settings: Settings
) -> None:
    job_id = await make_queued_job(session_factory)
    async with session_factory.begin() as session:
        await jobs.request_cancel(session, await make_tenant(session), job_id)
    assert await relay(session_factory, sender) == 1
    assert take_all(settings) == []


async def test_a_message_outlives_redis_being_away(
    session_factory: SessionFactory, sender: FinetuneSender, settings: Settings
) -> None:
    job_id = await make_queued_job(session_factory)
    nowhere = FinetuneSender(redis.asyncio.Redis(unix_socket_path="/nonexistent/redis.sock"))
    with pytest.raises(RedisConnectionError):
        await relay(session_factory, nowhere)
    assert await outbox(session_factory) == [job_id]
    async with session_factory.begin() as session:
        await session.execute(update(Outbox).values(due_at=now()))
    await relay(session_factory, sender)
    assert take_all(settings) == [job_id]


async def test_relays_beside_each_other_send_each_message_once(
    session_factory: SessionFactory, sender: FinetuneSender, settings: Settings
) -> None:
    ids = [await make_queued_job(session_factory) for _ in range(6)]
    counts = await asyncio.gather(*(relay(session_factory, sender) for _ in range(3)))
    assert sum(counts) == 6
    assert sorted(take_all(settings)) == sorted(ids)


async def test_a_job_lost_from_the_queue_is_sent_again(
    session_factory: SessionFactory,
    sender: FinetuneSender,
    redis_client: redis.asyncio.Redis,
    settings: Settings,
) -> None:
    job_id = await make_queued_job(session_factory)
    assert await resend_lost(session_factory, redis_client) == [], "it waits to be sent"
    await relay(session_factory, sender)
    assert await resend_lost(session_factory, redis_client) == [], "it was just sent"
    await age(session_factory, "sent_at", timedelta(minutes=2))
    assert await resend_lost(session_factory, redis_client) == [], "its entry is still there"
    await redis_client.flushdb()
    assert await resend_lost(session_factory, redis_client) == [job_id]
    assert await resend_lost(session_factory, redis_client) == []
    await relay(session_factory, sender)
    assert take_all(settings) == [job_id]


async def test_an_entry_that_nobody_takes_is_doubled_after_a_while(
    session_factory: SessionFactory, sender: FinetuneSender, redis_client: redis.asyncio.Redis
) -> None:
    job_id = await make_queued_job(session_factory)
    await relay(session_factory, sender)
    await age(session_factory, "sent_at", timedelta(minutes=11))
    assert await resend_lost(session_factory, redis_client) == [job_id]
    await relay(session_factory, sender)
    assert await redis_client.xlen(STREAM) == 2


async def test_a_job_nobody_wants_fails_after_a_week(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    assert await fail_forgotten(session_factory) == []
    await age(session_factory, "queued_at", timedelta(days=8))
    assert await fail_forgotten(session_factory) == [job_id]
    async with session_factory.begin() as session:
        assert (await session.get_one(FtJob, job_id)).error_code == "queue_timeout"


async def test_the_loop_takes_lost_jobs_back_and_sends_them(
    session_factory: SessionFactory, redis_client: redis.asyncio.Redis, settings: Settings
) -> None:
    job_id = await make_queued_job(session_factory)
    async with session_factory.begin() as session:
        await session.execute(update(FtJob).values(furthest_step=1))
    await claim_job(session_factory, job_id, lease_s=-1)
    async with session_factory.begin() as session:
        await session.execute(update(FtJob).values(furthest_step=5))
    dispatcher = Dispatcher(session_factory, redis_client, 0.02)
    loop = asyncio.create_task(dispatcher.run())
    for _ in range(200):
        await asyncio.sleep(0.02)
        if await redis_client.exists(STREAM):
            break
    dispatcher.stop()
    await loop
    assert take_all(settings) == [job_id]
    async with session_factory.begin() as session:
        assert (await session.get_one(FtJob, job_id)).status == "queued"


async def test_the_loop_outlives_an_outage(session_factory: SessionFactory, settings: Settings) -> None:
    await make_queued_job(session_factory)
    nowhere = redis.asyncio.Redis(unix_socket_path="/nonexistent/redis.sock")
    dispatcher = Dispatcher(session_factory, nowhere, 0.02)
    loop = asyncio.create_task(dispatcher.run())
    await asyncio.sleep(0.3)
    assert not loop.done()
    dispatcher.stop()
    await loop
