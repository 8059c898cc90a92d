"""Finetuning jobs as their worker sees them: claim, beat, commit, publish, end; and taking a lease back.

A claim moves the job's fence on. Every later write names its fence and is refused when the row has another:
the worker was taken for dead, the job may run elsewhere, and nothing that it does may count. Leases go by
the database's clock. Each function runs inside the caller's transaction.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from shared.db import now
from shared.errors import (
    ConflictError,
    JobCancelledError,
    NotClaimableError,
    NotFoundError,
    StaleFenceError,
)
from shared.job_metrics import finite, save_metrics
from shared.job_state import add_event, bill, end_job, leave_worker, lock_job, pause, requeue
from shared.messages import (
    BeatReply,
    BeatRequest,
    CheckpointRef,
    ClaimRequest,
    CommitCheckpoint,
    DatasetRef,
    EndJob,
    JobLease,
    PublishReply,
    PublishRequest,
    TrainSpec,
)
from shared.models import AdapterVersion, Checkpoint, File, FtJob, Tenant
from shared.versions import lock_adapter, publish_version


async def claim(session: AsyncSession, job_id: str, request: ClaimRequest, lease_s: float) -> JobLease:
    """Grants a queued job that is due under the next fence; raises NotClaimableError, NotFoundError."""
    job = await lock_job(session, job_id)
    await check_claimable(session, job, request)
    job.status = "running"
    job.worker_id = request.worker_id
    job.lease_until = now() + timedelta(seconds=lease_s)
    job.fence += 1
    job.attempt += 1
    job.claimed_step = job.furthest_step
    job.updated_at = now()
    if job.started_at is None:
        job.started_at = now()
    add_event(
        session, job, "Fine-tuning job started." if job.attempt == 1 else f"Attempt {job.attempt} started."
    )
    await session.flush()
    tenant = await session.get_one(Tenant, job.tenant_id)
    return JobLease(
        job_id=job.id,
        tenant_id=job.tenant_id,
        tenant_weight=tenant.weight,
        fence=job.fence,
        lease_s=lease_s,
        base_model=job.base_model,
        spec=TrainSpec.model_validate(job.spec),
        training=DatasetRef.model_validate(job.training_data),
        validation=DatasetRef.model_validate(job.validation_data) if job.validation_data else None,
        checkpoints=tuple(await committed_checkpoints(session, job.id)),
    )


async def check_claimable(session: AsyncSession, job: FtJob, request: ClaimRequest) -> None:
    if job.status != "queued":
        raise NotClaimableError(f"job {job.id} is {job.status}")
    if not await session.scalar(select(job.next_run_at <= now())):
        raise NotClaimableError(f"job {job.id} waits until {job.next_run_at.isoformat()}")
    if job.base_model != request.base_model or job.base_digest != request.base_digest:
        raise NotClaimableError(
            f"job {job.id} needs the base model {job.base_model} ({str(job.base_digest)[:12]}), "
            f"the worker has {request.base_model} ({request.base_digest[:12]})"
        )


async def committed_checkpoints(session: AsyncSession, job_id: str) -> list[CheckpointRef]:
    """Newest first."""
    query = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.expired_at.is_(None))
    return [
        CheckpointRef(
            checkpoint_id=row.id,
            step=row.step,
            manifest_key=row.manifest_key,
            manifest_sha256=row.manifest_sha256,
        )
        for row in await session.scalars(query.order_by(Checkpoint.seq.desc()))
    ]


async def lock_leased(session: AsyncSession, job_id: str, fence: int) -> FtJob:
    """The running job, if the fence is still the caller's."""
    job = await lock_job(session, job_id)
    if job.fence != fence or job.status != "running":
        raise StaleFenceError(
            f"job {job_id} is {job.status} under fence {job.fence}; fence {fence} no longer holds it"
        )
    return job


async def beat(session: AsyncSession, job_id: str, request: BeatRequest, lease_s: float) -> BeatReply:
    """Renews the lease, keeps the progress, and tells what the customer asked for meanwhile."""
    job = await lock_leased(session, job_id, request.fence)
    job.lease_until = now() + timedelta(seconds=lease_s)
    job.updated_at = now()
    job.step = request.step
    job.furthest_step = max(job.furthest_step, request.step)
    job.total_steps = request.total_steps
    job.trained_tokens = max(job.trained_tokens, request.trained_tokens)
    job.eta_s = finite(request.eta_s)
    await save_metrics(session, job, request.metrics)
    for item in request.messages:
        add_event(session, job, item.message, item.level)
    return BeatReply(cancel_requested=job.cancel_requested, pause_requested=job.pause_requested)


async def commit_checkpoint(session: AsyncSession, job_id: str, request: CommitCheckpoint) -> None:
    """Makes it the checkpoint to resume from. Committing the same one again does nothing."""
    job = await lock_leased(session, job_id, request.fence)
    existing = await session.get(Checkpoint, request.checkpoint_id)
    if existing is not None:
        if (existing.job_id, existing.manifest_sha256) != (job_id, request.manifest_sha256):
            raise ConflictError(f"checkpoint {request.checkpoint_id} exists with other content")
        return
    metrics = request.metrics.model_dump(exclude_none=True) if request.metrics else None
    session.add(
        Checkpoint(
            id=request.checkpoint_id,
            tenant_id=job.tenant_id,
            job_id=job_id,
            fence=request.fence,
            step=request.step,
            manifest_key=request.manifest_key,
            manifest_sha256=request.manifest_sha256,
            metrics=metrics and {name: finite(value) for name, value in metrics.items()},
        )
    )
    job.furthest_step = max(job.furthest_step, request.step)
    job.updated_at = now()
    add_event(session, job, f"Checkpoint created at step {request.step}.")


async def publish(
    session: AsyncSession, job_id: str, request: PublishRequest, result_file: File | None = None
) -> PublishReply:
    """The adapter's next version, the alias and the job's success, all or nothing, once a job.

    The caller has checked the objects. A repeated call for the same job and digest gets the same reply.
    """
    unlocked = await session.get(FtJob, job_id)
    if unlocked is None:
        raise NotFoundError(f"no fine-tuning job {job_id!r}")
    adapter = await lock_adapter(session, unlocked.tenant_id, unlocked.adapter_name)
    job = await lock_job(session, job_id)
    if job.status == "succeeded":
        return await published_before(session, job, request)
    if job.fence != request.fence or job.status != "running":
        raise StaleFenceError(f"job {job_id} is {job.status} under fence {job.fence}, not {request.fence}")
    if job.cancel_requested:
        raise JobCancelledError(f"job {job_id} was cancelled before it was published")
    if job.base_digest != request.base_digest:
        raise ConflictError(f"job {job_id} belongs to another base model", code="wrong_base_model")
    job.status = "publishing"
    await session.flush()
    version = await publish_version(session, adapter, job, request)
    if result_file is not None:
        session.add(result_file)
        await session.flush()
        job.result_file = result_file.id
    leave_worker(job)
    job.status = "succeeded"
    job.result_version, job.fine_tuned_model = version.id, version.model_name
    job.trained_tokens = max(job.trained_tokens, request.trained_tokens)
    job.finished_at = job.updated_at = now()
    add_event(session, job, f"New fine-tuned model created: {version.model_name}")
    add_event(session, job, "The job has successfully completed.")
    await bill(session, job)
    await session.flush()
    return reply_of(version)


async def published_before(session: AsyncSession, job: FtJob, request: PublishRequest) -> PublishReply:
    version = await session.get_one(AdapterVersion, job.result_version)
    if version.digest != request.digest:
        raise StaleFenceError(f"job {job.id} was published before, with other weights")
    return reply_of(version)


def reply_of(version: AdapterVersion) -> PublishReply:
    return PublishReply(version_id=version.id, version=version.version, model=version.model_name)


async def end(session: AsyncSession, job_id: str, request: EndJob) -> None:
    """The worker gives the job up. A release without a code is one in good order, such as a shutdown."""
    job = await lock_leased(session, job_id, request.fence)
    words = request.message or request.code
    if request.outcome == "failed":
        message = request.message or "The job failed."
        await end_job(session, job, "failed", message, code=request.code or "training_failed")
    elif request.outcome == "cancelled":
        await end_job(session, job, "cancelled", "The job was cancelled.")
    elif request.outcome == "paused" and not job.cancel_requested:
        pause(session, job)
    else:
        why = f"The worker gave the job back: {words}." if words else "The worker gave the job back."
        await requeue(session, job, why, counts=request.code is not None)


async def reclaim_expired(session: AsyncSession, limit: int = 50) -> list[str]:
    """Takes jobs back from workers whose lease is over; returns their ids."""
    expired = (
        select(FtJob)
        .where(FtJob.status.in_(("running", "publishing")), FtJob.lease_until < now())
        .order_by(FtJob.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    jobs = list(await session.scalars(expired))
    for job in jobs:
        await requeue(session, job, f"Worker {job.worker_id} was lost.")
    return [job.id for job in jobs]
