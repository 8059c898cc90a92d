"""Finetuning jobs as their owner sees them: create, read, cancel, pause, resume.

Each function runs inside the caller's transaction and is scoped to a tenant; what belongs to another is not
found. `shared.job_leases` has the worker's side of the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from shared.db import now
from shared.errors import (
    ConflictError,
    IdempotencyMismatchError,
    InvalidRequestError,
    LimitExceededError,
    NotFoundError,
)
from shared.files import get_file
from shared.ids import adapter_name_of, new_id
from shared.job_state import add_event, end_job, enqueue, is_over, lock_job, pause, requeue
from shared.messages import TrainSpec
from shared.models import TERMINAL_STATUSES, Checkpoint, FtEvent, FtJob, Idempotency
from shared.outbox import require_task
from shared.paging import Page, fetch_page

TRAINING_PURPOSE = "fine-tune"
DEDUPE_WINDOW = timedelta(seconds=30)  # the official client repeats a lost request within this
IDEMPOTENCY_KEPT = timedelta(hours=24)
MAX_UNFINISHED_JOBS = 200  # of one tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A checked request. `request_hash` is of its body: equal hashes are the same request."""

    base_model: str
    training_file: str
    spec: TrainSpec
    request_hash: str
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    validation_file: str | None = None
    suffix: str | None = None
    method: dict[str, Any] | None = None
    integrations: list[Any] | None = None
    metadata: dict[str, str] | None = None
    extension: dict[str, Any] | None = None
    promote: bool = False
    priority: int = 0
    key_id: str | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class CreatedJob:
    """`is_new` is False for a repeated request, which gets the job that the first one made."""

    job: FtJob
    is_new: bool


async def create_job(session: AsyncSession, tenant_id: str, new: NewJob) -> CreatedJob:
    """The job in `validating_files` and its `validate_dataset` task, to be sent after the commit.

    A request is a repetition when it has the Idempotency-Key of an earlier one, or, without a key, the body
    of an unfinished job that is less than `DEDUPE_WINDOW` old.
    """
    await lock_request(session, tenant_id, new)
    earlier = await find_earlier(session, tenant_id, new)
    if earlier is not None:
        return CreatedJob(earlier, is_new=False)
    await check_new_job(session, tenant_id, new)
    job = make_row(tenant_id, new)
    session.add(job)
    await session.flush()
    if new.idempotency_key is not None:
        session.add(
            Idempotency(
                tenant_id=tenant_id,
                key=new.idempotency_key,
                request_hash=new.request_hash,
                resource_id=job.id,
            )
        )
    add_event(session, job, f"Created fine-tuning job: {job.id}")
    add_event(session, job, f"Validating training file: {job.training_file}")
    await require_task(session, "validate_dataset", job.id)
    await session.flush()
    return CreatedJob(job, is_new=True)


async def lock_request(session: AsyncSession, tenant_id: str, new: NewJob) -> None:
    """Repetitions of one request wait for each other, to the end of the transaction."""
    text = f"{tenant_id} {new.idempotency_key or new.request_hash}"
    await session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(text, 0))))


async def find_earlier(session: AsyncSession, tenant_id: str, new: NewJob) -> FtJob | None:
    if new.idempotency_key is None:
        query = select(FtJob).where(
            FtJob.tenant_id == tenant_id,
            FtJob.request_hash == new.request_hash,
            FtJob.created_at > now() - DEDUPE_WINDOW,
            FtJob.status.not_in(TERMINAL_STATUSES),
        )
        return await session.scalar(query.order_by(FtJob.seq.desc()).limit(1))
    row = await session.get(Idempotency, (tenant_id, new.idempotency_key))
    if row is None:
        return None
    if await session.scalar(select(row.created_at + IDEMPOTENCY_KEPT < now())):
        await session.delete(row)
        await session.flush()
        return None
    if row.request_hash != new.request_hash:
        raise IdempotencyMismatchError("this Idempotency-Key was used before with another request body")
    return await get_job(session, tenant_id, row.resource_id)


async def check_new_job(session: AsyncSession, tenant_id: str, new: NewJob) -> None:
    unfinished = await session.scalar(
        select(func.count()).where(FtJob.tenant_id == tenant_id, FtJob.status.not_in(TERMINAL_STATUSES))
    )
    if (unfinished or 0) >= MAX_UNFINISHED_JOBS:
        raise LimitExceededError(
            f"{unfinished} fine-tuning jobs are unfinished; the limit is {MAX_UNFINISHED_JOBS}"
        )
    for param in ("training_file", "validation_file"):
        file_id = getattr(new, param)
        if file_id is None:
            continue
        file = await get_file(session, tenant_id, file_id, param=param)
        if file.purpose != TRAINING_PURPOSE:
            message = f"file {file_id!r} has the purpose {file.purpose!r}, not {TRAINING_PURPOSE!r}"
            raise InvalidRequestError(message, param=param)


def make_row(tenant_id: str, new: NewJob) -> FtJob:
    job_id = new_id("ftjob-")
    try:
        adapter_name = adapter_name_of(new.suffix or job_id)
    except ValueError as error:
        raise InvalidRequestError(str(error), param="suffix") from error
    return FtJob(
        id=job_id,
        tenant_id=tenant_id,
        key_id=new.key_id,
        base_model=new.base_model,
        training_file=new.training_file,
        validation_file=new.validation_file,
        suffix=new.suffix,
        method=new.method,
        hyperparameters=new.hyperparameters,
        integrations=new.integrations,
        metadata_=new.metadata,
        extension=new.extension,
        request_hash=new.request_hash,
        promote=new.promote,
        adapter_name=adapter_name,
        spec=new.spec.model_dump(mode="json"),
        priority=new.priority,
    )


def public_status(job: FtJob) -> str:
    """As OpenAI's clients know it, and `paused`."""
    return "running" if job.status == "publishing" else job.status


async def get_job(session: AsyncSession, tenant_id: str, job_id: str) -> FtJob:
    job = await session.scalar(select(FtJob).where(FtJob.id == job_id, FtJob.tenant_id == tenant_id))
    if job is None:
        raise NotFoundError(f"no fine-tuning job {job_id!r}")
    return job


async def list_jobs(
    session: AsyncSession,
    tenant_id: str,
    *,
    metadata: dict[str, str] | None = None,
    without_metadata: bool = False,
    after: str | None = None,
    limit: int = 20,
) -> Page[FtJob]:
    """Newest first; those whose metadata has all of `metadata`, or none at all."""
    filters: list[ColumnElement[bool]] = []
    if metadata:
        filters.append(FtJob.metadata_.contains(metadata))
    if without_metadata:
        filters.append(FtJob.metadata_.is_(None))
    return await fetch_page(session, FtJob, tenant_id, filters, after=after, limit=limit)


async def list_events(
    session: AsyncSession, tenant_id: str, job_id: str, *, after: str | None = None, limit: int = 20
) -> Page[FtEvent]:
    """Newest first."""
    await get_job(session, tenant_id, job_id)
    return await fetch_page(session, FtEvent, tenant_id, [FtEvent.job_id == job_id], after=after, limit=limit)


async def list_checkpoints(
    session: AsyncSession, tenant_id: str, job_id: str, *, after: str | None = None, limit: int = 10
) -> Page[Checkpoint]:
    """Newest first, also those whose files have been removed since."""
    await get_job(session, tenant_id, job_id)
    return await fetch_page(
        session, Checkpoint, tenant_id, [Checkpoint.job_id == job_id], after=after, limit=limit
    )


async def request_cancel(session: AsyncSession, tenant_id: str, job_id: str) -> FtJob:
    """Cancels at once, or asks the worker to; a job that is over stays as it is."""
    job = await lock_job(session, job_id, tenant_id)
    if is_over(job):
        return job
    if job.worker_id is None:
        await end_job(session, job, "cancelled", "The job was cancelled.")
    elif not job.cancel_requested:
        job.cancel_requested = True
        add_event(session, job, "Cancellation is requested.")
        await take_back_if_expired(session, job)
    return await reread(session, job)


async def request_pause(session: AsyncSession, tenant_id: str, job_id: str) -> FtJob:
    """Pauses a queued job at once and a running one after its next checkpoint."""
    job = await lock_job(session, job_id, tenant_id)
    if job.status == "queued":
        pause(session, job)
    elif job.status == "running" and not job.cancel_requested:
        if not job.pause_requested:
            job.pause_requested = True
            add_event(session, job, "A pause is requested.")
            await take_back_if_expired(session, job)
    elif job.status != "paused":
        raise ConflictError(f"a job that is {public_status(job)} cannot be paused", code="job_not_pausable")
    return await reread(session, job)


async def request_resume(session: AsyncSession, tenant_id: str, job_id: str) -> FtJob:
    """Queues a paused job again, or takes a pause back that no worker has answered yet."""
    job = await lock_job(session, job_id, tenant_id)
    if job.status == "paused":
        job.no_progress = 0
        enqueue(session, job)
        add_event(session, job, "The job is resumed.")
    elif job.status == "running" and job.pause_requested:
        job.pause_requested = False
        add_event(session, job, "The requested pause is taken back.")
    elif job.status not in ("queued", "running"):
        raise ConflictError(f"a job that is {public_status(job)} cannot be resumed", code="job_not_resumable")
    return await reread(session, job)


async def reread(session: AsyncSession, job: FtJob) -> FtJob:
    """With the times that the database has put in."""
    await session.flush()
    await session.refresh(job)
    return job


async def take_back_if_expired(session: AsyncSession, job: FtJob) -> None:
    """Nobody is left to answer the request where the worker is gone."""
    if await session.scalar(select(job.lease_until < now())):
        await requeue(session, job, "The worker was lost.")
