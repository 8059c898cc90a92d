"""Tasks that must happen: run one at a time, tried again, and given up with a word.

A task holds an advisory lock of Postgres on a connection of its own while it runs. The lock goes with the
process, so that a killed task can be started again at once and none runs twice at a time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from shared.db import SessionFactory, now, session_factory
from shared.job_state import end_job, lock_job
from shared.models import BgTask
from shared.outbox import TaskKind

MAX_TRIES = 5
RESEND_AFTER = timedelta(seconds=60)
BATCH = 500
log = structlog.get_logger()


@asynccontextmanager
async def exclusive(engine: AsyncEngine, name: str) -> AsyncIterator[bool]:
    """True for the one holder of the name in the whole cluster, False for anyone else meanwhile."""
    key = func.hashtextextended(f"flexllm:{name}", 0)
    async with engine.connect() as connection:
        connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
        held = bool(await connection.scalar(select(func.pg_try_advisory_lock(key))))
        try:
            yield held
        finally:
            if held:
                await connection.execute(select(func.pg_advisory_unlock(key)))


async def run_required(
    engine: AsyncEngine, kind: TaskKind, ref: str, work: Callable[[], Awaitable[None]]
) -> None:
    """Runs `work` and marks the task done. After an error the sweeper sends it again, `MAX_TRIES` times."""
    factory = session_factory(engine)
    async with exclusive(engine, f"{kind}:{ref}") as held:
        if not held or not await begin_try(factory, kind, ref):
            return
        try:
            await work()
        except Exception as error:
            log.exception("task_failed", kind=kind, ref=ref)
            await end_try(factory, kind, ref, error)
        else:
            await mark_done(factory, kind, ref)


async def begin_try(factory: SessionFactory, kind: TaskKind, ref: str) -> bool:
    async with factory.begin() as session:
        statement = (
            update(BgTask)
            .where(BgTask.kind == kind, BgTask.ref == ref, BgTask.done_at.is_(None))
            .values(tries=BgTask.tries + 1)
            .returning(BgTask.id)
        )
        return await session.scalar(statement) is not None


async def mark_done(factory: SessionFactory, kind: TaskKind, ref: str) -> None:
    async with factory.begin() as session:
        await session.execute(
            update(BgTask).where(BgTask.kind == kind, BgTask.ref == ref).values(done_at=now())
        )


async def end_try(factory: SessionFactory, kind: TaskKind, ref: str, error: Exception) -> None:
    """Later again, or never more: then a job fails rather than wait for ever."""
    async with factory.begin() as session:
        query = select(BgTask).where(BgTask.kind == kind, BgTask.ref == ref).with_for_update()
        task = (await session.scalars(query)).one()
        task.error = f"{type(error).__name__}: {error}"[:2000]
        task.due_at = now() + RESEND_AFTER * task.tries
        if task.tries < MAX_TRIES:
            return
        task.done_at = now()
        if kind == "validate_dataset":
            job = await lock_job(session, ref)
            if job.status == "validating_files":
                message = "The files could not be validated because of an error on our side."
                await end_job(session, job, "failed", message, code="server_error")


async def take_due(factory: SessionFactory) -> list[tuple[str, str]]:
    """(kind, ref) of tasks whose message seems lost; each is not due again for a while."""
    due = select(BgTask.id).where(BgTask.done_at.is_(None), BgTask.due_at <= now()).limit(BATCH)
    statement = (
        update(BgTask)
        .where(BgTask.id.in_(due.with_for_update(skip_locked=True)))
        .values(due_at=now() + RESEND_AFTER)
        .returning(BgTask.kind, BgTask.ref)
    )
    async with factory.begin() as session:
        return [(kind, ref) for kind, ref in await session.execute(statement)]
