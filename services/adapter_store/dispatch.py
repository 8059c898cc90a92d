"""Carries what was committed to where it is waited for, and takes jobs back from lost workers.

A small loop in the store's process; any number may run beside each other. Messages go out between two short
transactions, never inside one, and at least once: whoever takes a job's id looks at its row.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from typing import Any

import redis.asyncio
import structlog
from redis.exceptions import RedisError
from sqlalchemy import delete, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from shared.db import SessionFactory, now
from shared.job_leases import reclaim_expired
from shared.job_state import end_job
from shared.models import FtJob, Outbox
from shared.outbox import send_after_commit
from shared.queue import FinetuneSender
from shared.queue.finetune import STREAM

BATCH = 100
RETRY_AFTER = timedelta(seconds=10)
LOST_AFTER = timedelta(seconds=60)  # a queued job without an entry in the queue
STUCK_AFTER = timedelta(minutes=10)  # a queued job whose entry nobody has taken
QUEUED_AT_MOST = timedelta(days=7)
MAX_ENTRIES = 10_000
OUTAGE_PAUSE_S = 1.0
log = structlog.get_logger()


async def relay(factory: SessionFactory, sender: FinetuneSender) -> int:
    """Sends what is due; returns how many messages were taken care of."""
    async with factory.begin() as session:
        query = select(Outbox).where(Outbox.due_at <= now()).order_by(Outbox.id).limit(BATCH)
        rows = list(await session.scalars(query.with_for_update(skip_locked=True)))
        for row in rows:
            row.due_at = now() + RETRY_AFTER  # ours until then
        waiting = update(FtJob).where(FtJob.id.in_([row.key for row in rows]), FtJob.status == "queued")
        ready = set(await session.scalars(waiting.values(sent_at=now()).returning(FtJob.id)))
    for job_id in dict.fromkeys(row.key for row in rows if row.key in ready):
        await sender.send(job_id)
    async with factory.begin() as session:
        await session.execute(delete(Outbox).where(Outbox.id.in_([row.id for row in rows])))
    return len(rows)


async def resend_lost(factory: SessionFactory, client: redis.asyncio.Redis) -> list[str]:
    """Queues the ids of jobs again that wait in Postgres but not in Redis, or have waited there too long."""
    entries: Any = await client.xrange(STREAM, count=MAX_ENTRIES)
    present = [fields["job_id"] for _, fields in entries]
    async with factory.begin() as session:
        pending = select(Outbox.key).where(Outbox.topic == "finetune")
        lost = or_(
            FtJob.id.not_in(present) & or_(FtJob.sent_at.is_(None), FtJob.sent_at < now() - LOST_AFTER),
            FtJob.sent_at < now() - STUCK_AFTER,
        )
        query = select(FtJob.id).where(
            FtJob.status == "queued", FtJob.next_run_at <= now(), FtJob.id.not_in(pending), lost
        )
        ids = list(await session.scalars(query.limit(BATCH)))
        for job_id in ids:
            send_after_commit(session, "finetune", job_id)
    return ids


async def fail_forgotten(factory: SessionFactory) -> list[str]:
    """Ends jobs that no worker has wanted for a week."""
    async with factory.begin() as session:
        query = select(FtJob).where(FtJob.status == "queued", FtJob.queued_at < now() - QUEUED_AT_MOST)
        jobs = list(await session.scalars(query.limit(BATCH).with_for_update(skip_locked=True)))
        for job in jobs:
            message = "No worker took the job within seven days."
            await end_job(session, job, "failed", message, code="queue_timeout")
    return [job.id for job in jobs]


class Dispatcher:
    """The loop. An outage is waited out; `stop` lets the step at hand finish."""

    def __init__(self, factory: SessionFactory, client: redis.asyncio.Redis, interval_s: float) -> None:
        self._factory = factory
        self._sender = FinetuneSender(client)
        self._interval_s = interval_s
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        while not self._stopping.is_set():
            try:
                pause_s = self._interval_s if await self.step() < BATCH else 0.0
            except (SQLAlchemyError, RedisError, OSError) as error:
                log.warning("dispatch_failed", error=str(error))
                pause_s = OUTAGE_PAUSE_S
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)

    def stop(self) -> None:
        self._stopping.set()

    async def step(self) -> int:
        """Lost workers' jobs first, so that their ids go out at once."""
        async with self._factory.begin() as session:
            reclaimed = await reclaim_expired(session)
        if reclaimed:
            log.warning("leases_expired", jobs=reclaimed)
        return await relay(self._factory, self._sender)
