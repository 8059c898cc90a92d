"""The moves of a finetuning job, shared by everyone who may make one.

Every function changes a row that the caller has locked, inside the caller's transaction. The database's
guard refuses what is not a legal move; these functions also keep the columns that go with a state.
"""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from shared.db import now
from shared.errors import NotFoundError
from shared.ids import new_id
from shared.models import TERMINAL_STATUSES, FtEvent, FtJob, UsageRecord
from shared.outbox import send_after_commit

MAX_NO_PROGRESS = 3  # claims in a row without a step forward
MAX_BACKOFF_S = 300.0
MAX_MESSAGE_CHARS = 2000
Ending = Literal["cancelled", "failed"]
Level = Literal["info", "warn", "error"]


async def lock_job(session: AsyncSession, job_id: str, tenant_id: str | None = None) -> FtJob:
    """The job, locked to the end of the transaction. Customers' callers give the tenant; workers do not."""
    query = (
        select(FtJob).where(FtJob.id == job_id).with_for_update().execution_options(populate_existing=True)
    )
    if tenant_id is not None:
        query = query.where(FtJob.tenant_id == tenant_id)
    job = await session.scalar(query)
    if job is None:
        raise NotFoundError(f"no fine-tuning job {job_id!r}")
    return job


def is_over(job: FtJob) -> bool:
    return job.status in TERMINAL_STATUSES


def add_event(
    session: AsyncSession,
    job: FtJob,
    message: str,
    level: Level = "info",
    data: dict[str, Any] | None = None,
) -> None:
    session.add(
        FtEvent(
            id=new_id("ftevent-"),
            tenant_id=job.tenant_id,
            job_id=job.id,
            level=level,
            message=message[:MAX_MESSAGE_CHARS],
            data=data,
        )
    )


def enqueue(session: AsyncSession, job: FtJob, *, delay_s: float = 0.0) -> None:
    """To `queued`, and its id to the finetune queue once it is due."""
    leave_worker(job)
    job.status = "queued"
    job.queued_at = job.updated_at = now()
    job.next_run_at = now() + timedelta(seconds=delay_s)
    job.sent_at = None
    send_after_commit(session, "finetune", job.id, delay_s=delay_s)


def pause(session: AsyncSession, job: FtJob) -> None:
    leave_worker(job)
    job.status = "paused"
    job.pause_requested = False
    job.updated_at = now()
    add_event(session, job, "The job is paused.")


async def end_job(
    session: AsyncSession,
    job: FtJob,
    status: Ending,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """To a terminal state without a result. `data` goes with the event that says so."""
    leave_worker(job)
    job.status = status
    job.finished_at = job.updated_at = now()
    if status == "failed":
        job.error_code, job.error_message, job.error_param = code, message[:MAX_MESSAGE_CHARS], param
    add_event(session, job, message, "error" if status == "failed" else "info", data)
    await bill(session, job)


async def requeue(session: AsyncSession, job: FtJob, why: str, *, counts: bool = True) -> None:
    """Back from a worker that will not finish it. Fails after `MAX_NO_PROGRESS` claims without progress.

    `counts=False`: the worker gave it up in good order, which is no sign of a bad job.
    """
    if job.status == "publishing":
        job.worker_id, job.status = None, "queued"
        await session.flush()
    if job.furthest_step > job.claimed_step:
        job.no_progress = 0
    elif counts:
        job.no_progress += 1
    if job.cancel_requested:
        await end_job(session, job, "cancelled", "The job was cancelled.")
    elif job.pause_requested:
        pause(session, job)
    elif job.no_progress >= MAX_NO_PROGRESS:
        message = f"The job was given up after {job.no_progress} attempts without progress. Last: {why}"
        await end_job(session, job, "failed", message, code="worker_crash_loop")
    else:
        enqueue(session, job, delay_s=backoff_s(job.no_progress) if counts else 0.0)
        add_event(session, job, f"{why} The job is queued again.", "warn" if counts else "info")


def backoff_s(no_progress: int) -> float:
    """Nothing after progress, then two seconds doubling, with jitter."""
    if no_progress == 0:
        return 0.0
    return float(min(2**no_progress, MAX_BACKOFF_S)) * random.uniform(0.5, 1.0)


def leave_worker(job: FtJob) -> None:
    job.worker_id = job.lease_until = job.eta_s = None


async def bill(session: AsyncSession, job: FtJob) -> None:
    """Once a job, by its id; an unfinished job's tokens were computed too."""
    if job.trained_tokens == 0:
        return
    usage = insert(UsageRecord).values(
        id=job.id,
        tenant_id=job.tenant_id,
        key_id=job.key_id,
        kind="finetune",
        model=job.base_model,
        version_id=job.result_version,
        trained_tokens=job.trained_tokens,
    )
    await session.execute(usage.on_conflict_do_nothing())
