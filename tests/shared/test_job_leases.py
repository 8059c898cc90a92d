"""Jobs as their worker sees them: every effect under a fence, every job published once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from shared import job_leases, jobs
from shared.db import SessionFactory
from shared.errors import (
    ConflictError,
    JobCancelledError,
    NotClaimableError,
    NotFoundError,
    StaleFenceError,
)
from shared.job_state import backoff_s
from shared.messages import BeatRequest, EndJob, JobMessage, StepMetrics
from shared.models import AdapterVersion, AuditLog, File, FtJob, FtMetric, Outbox, UsageRecord
from tests.records import (
    BASE_DIGEST,
    DATASET,
    LEASE_S,
    claim_job,
    make_checkpoint,
    make_claim,
    make_file,
    make_job,
    make_publish,
    make_queued_job,
    make_tenant,
    publish_job,
)


async def read_job(factory: SessionFactory, job_id: str) -> FtJob:
    async with factory.begin() as session:
        return await session.get_one(FtJob, job_id)


def make_beat(fence: int, step: int = 1, **fields: Any) -> BeatRequest:
    return BeatRequest(
        **{"fence": fence, "step": step, "total_steps": 10, "trained_tokens": 5 * step, **fields}
    )


async def send_beat(factory: SessionFactory, job_id: str, beat: BeatRequest) -> Any:
    async with factory.begin() as session:
        return await job_leases.beat(session, job_id, beat, LEASE_S)


async def end_job(factory: SessionFactory, job_id: str, fence: int, outcome: Any, **fields: Any) -> FtJob:
    async with factory.begin() as session:
        await job_leases.end(session, job_id, EndJob(fence=fence, outcome=outcome, **fields))
    return await read_job(factory, job_id)


async def expire(factory: SessionFactory) -> list[str]:
    """Lets every lease run out and takes the jobs back."""
    past = func.clock_timestamp() - text("interval '1 s'")
    async with factory.begin() as session:
        await session.execute(update(FtJob).where(FtJob.status == "running").values(lease_until=past))
    async with factory.begin() as session:
        return await job_leases.reclaim_expired(session)


async def make_due(factory: SessionFactory) -> None:
    due = update(FtJob).where(FtJob.status == "queued").values(next_run_at=func.clock_timestamp())
    async with factory.begin() as session:
        await session.execute(due)


async def test_a_claim_grants_what_the_worker_needs(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    lease = await claim_job(session_factory, job_id)
    assert (lease.job_id, lease.fence, lease.lease_s, lease.tenant_weight) == (job_id, 1, LEASE_S, 1.0)
    assert (lease.training, lease.validation, lease.checkpoints) == (DATASET, None, ())
    job = await read_job(session_factory, job_id)
    assert (job.status, job.worker_id, job.attempt) == ("running", "w1", 1)
    assert job.started_at is not None


async def test_of_many_claims_at_once_one_is_granted(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    results = await asyncio.gather(
        *(claim_job(session_factory, job_id, f"w{n}") for n in range(8)), return_exceptions=True
    )
    assert sum(not isinstance(result, BaseException) for result in results) == 1
    assert sum(isinstance(result, NotClaimableError) for result in results) == 7
    assert (await read_job(session_factory, job_id)).fence == 1


async def test_only_a_queued_job_that_is_due_is_granted(session_factory: SessionFactory) -> None:
    with pytest.raises(NotFoundError):
        await claim_job(session_factory, "ftjob-none")
    async with session_factory.begin() as session:
        new = await make_job(session, await make_tenant(session))
    with pytest.raises(NotClaimableError, match="validating_files"):
        await claim_job(session_factory, new.id)
    job_id = await make_queued_job(session_factory)
    async with session_factory.begin() as session:
        later = func.clock_timestamp() + text("interval '1 hour'")
        await session.execute(update(FtJob).where(FtJob.id == job_id).values(next_run_at=later))
    with pytest.raises(NotClaimableError, match="waits until"):
        await claim_job(session_factory, job_id)


@pytest.mark.parametrize("fields", [{"base_model": "other"}, {"base_digest": "0" * 64}])
async def test_a_worker_with_another_base_model_is_refused(
    session_factory: SessionFactory, fields: dict[str, str]
) -> None:
    job_id = await make_queued_job(session_factory)
    async with session_factory.begin() as session:
        with pytest.raises(NotClaimableError, match="needs the base model"):
            await job_leases.claim(session, job_id, make_claim(**fields), LEASE_S)


async def test_a_beat_keeps_progress_and_brings_back_requests(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    lease = await claim_job(session_factory, job_id, lease_s=-1)
    reply = await send_beat(session_factory, job_id, make_beat(lease.fence, 3, eta_s=12.5))
    assert not reply.cancel_requested and not reply.pause_requested
    job = await read_job(session_factory, job_id)
    assert (job.step, job.total_steps, job.trained_tokens, job.eta_s) == (3, 10, 15, 12.5)
    async with session_factory.begin() as session:
        assert await job_leases.reclaim_expired(session) == [], "the beat renewed the lease"
        await jobs.request_cancel(session, job.tenant_id, job_id)
    assert (await send_beat(session_factory, job_id, make_beat(lease.fence, 4))).cancel_requested


async def test_metrics_keep_one_row_a_step_and_later_reports_win(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    fence = (await claim_job(session_factory, job_id)).fence
    first = (StepMetrics(step=1, train_loss=2.0), StepMetrics(step=2, train_loss=1.5, learning_rate=0.1))
    evaluation = (StepMetrics(step=2, valid_loss=1.8), StepMetrics(step=2, valid_mean_token_accuracy=0.5))
    again = (StepMetrics(step=2, train_loss=1.4), StepMetrics(step=3, train_loss=math.nan))
    for metrics in (first, evaluation, again):
        await send_beat(session_factory, job_id, make_beat(fence, 3, metrics=metrics))
    async with session_factory.begin() as session:
        rows = list(await session.scalars(select(FtMetric).order_by(FtMetric.step)))
        assert [row.train_loss for row in rows[:2]] == [2.0, 1.4]
        assert rows[2].train_loss is not None and math.isnan(rows[2].train_loss)
        second = rows[1]
        assert (second.valid_loss, second.valid_mean_token_accuracy, second.learning_rate) == (1.8, 0.5, 0.1)
        job = await session.get_one(FtJob, job_id)
        events = (await jobs.list_events(session, job.tenant_id, job_id, limit=50)).items
    shown = [event.data for event in reversed(events) if event.type == "metrics"]
    assert [(each["step"], each.get("train_loss"), each.get("valid_loss")) for each in shown if each] == [
        (1, 2.0, None),
        (2, 1.5, None),
        (2, None, 1.8),
        (3, None, None),
    ]


async def test_messages_of_a_beat_become_events(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    fence = (await claim_job(session_factory, job_id)).fence
    message = JobMessage(level="warn", message="The loss is not finite; the step is skipped.")
    await send_beat(session_factory, job_id, make_beat(fence, messages=(message,)))
    async with session_factory.begin() as session:
        event = (await jobs.list_events(session, await make_tenant(session), job_id)).items[0]
    assert (event.level, event.message, event.type) == ("warn", message.message, "message")


async def test_committed_checkpoints_are_offered_newest_first(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    fence = (await claim_job(session_factory, job_id)).fence
    commits = [
        make_checkpoint(fence, step, metrics=StepMetrics(step=step, train_loss=1.0)) for step in (5, 10)
    ]
    for commit in (*commits, commits[1]):  # a repeated call does nothing
        async with session_factory.begin() as session:
            await job_leases.commit_checkpoint(session, job_id, commit)
    async with session_factory.begin() as session:
        other = make_checkpoint(fence, 10, checkpoint_id=commits[1].checkpoint_id, manifest_sha256="e" * 64)
        with pytest.raises(ConflictError):
            await job_leases.commit_checkpoint(session, job_id, other)
    await expire(session_factory)
    lease = await claim_job(session_factory, job_id)
    assert [each.checkpoint_id for each in lease.checkpoints] == [
        commits[1].checkpoint_id,
        commits[0].checkpoint_id,
    ]
    async with session_factory.begin() as session:
        page = await jobs.list_checkpoints(session, await make_tenant(session), job_id, limit=1)
    assert page.has_more and page.items[0].metrics == {"step": 10, "train_loss": 1.0, "num_tokens": 0}


Write = Callable[[AsyncSession, str, int], Awaitable[Any]]


async def write_beat(session: AsyncSession, job_id: str, fence: int) -> None:
    await job_leases.beat(session, job_id, make_beat(fence), LEASE_S)


async def write_checkpoint(session: AsyncSession, job_id: str, fence: int) -> None:
    await job_leases.commit_checkpoint(session, job_id, make_checkpoint(fence))


async def write_publish(session: AsyncSession, job_id: str, fence: int) -> None:
    await job_leases.publish(session, job_id, make_publish(fence))


async def write_end(session: AsyncSession, job_id: str, fence: int) -> None:
    await job_leases.end(session, job_id, EndJob(fence=fence, outcome="failed", message="no"))


@pytest.mark.parametrize("write", [write_beat, write_checkpoint, write_publish, write_end])
@pytest.mark.parametrize("now", ["queued", "running elsewhere", "cancelled"])
async def test_a_stale_fence_is_refused_everywhere_and_changes_nothing(
    session_factory: SessionFactory, write: Write, now: str
) -> None:
    job_id = await make_queued_job(session_factory)
    stale = (await claim_job(session_factory, job_id)).fence
    await expire(session_factory)
    await make_due(session_factory)
    if now == "running elsewhere":
        await claim_job(session_factory, job_id, "w2")
    async with session_factory.begin() as session:
        if now == "cancelled":
            await jobs.request_cancel(session, await make_tenant(session), job_id)
    before = await read_job(session_factory, job_id)
    async with session_factory() as session:
        with pytest.raises(StaleFenceError):
            await write(session, job_id, stale)
    after = await read_job(session_factory, job_id)
    assert (after.status, after.fence, after.step, after.updated_at) == (
        before.status,
        before.fence,
        before.step,
        before.updated_at,
    )


async def test_publishing_makes_a_served_version_and_ends_the_job(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory, suffix="bot")
    reply = await publish_job(session_factory, job_id)
    assert reply.version == 1 and reply.model == f"ft:tiny:acme:bot:{reply.version_id[4:12]}"
    job = await read_job(session_factory, job_id)
    assert (job.status, job.result_version, job.fine_tuned_model) == (
        "succeeded",
        reply.version_id,
        reply.model,
    )
    assert job.worker_id is None and job.finished_at is not None and job.trained_tokens == 50
    async with session_factory.begin() as session:
        version = await session.get_one(AdapterVersion, reply.version_id)
        assert (version.state, version.source_job, version.dataset_digest) == ("READY", job_id, "d" * 64)
        assert version.hyperparameters["n_epochs"] == 3
        usage = await session.get_one(UsageRecord, job_id)
        assert (usage.kind, usage.trained_tokens, usage.version_id) == ("finetune", 50, reply.version_id)
        actions = list(await session.scalars(select(AuditLog.action).order_by(AuditLog.id)))
        assert actions[-2:] == ["version.publish", "alias.move"]


async def test_publishing_again_or_many_at_once_makes_one_version(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    fence = (await claim_job(session_factory, job_id)).fence

    async def publish() -> Any:
        async with session_factory.begin() as session:
            return await job_leases.publish(session, job_id, make_publish(fence))

    replies = await asyncio.gather(*(publish() for _ in range(6)))
    replies.append(await publish())
    assert len({reply.version_id for reply in replies}) == 1
    async with session_factory.begin() as session:
        assert await session.scalar(select(func.count()).select_from(AdapterVersion)) == 1
        with pytest.raises(StaleFenceError, match="other weights"):
            await job_leases.publish(session, job_id, make_publish(fence, b"other weights"))


async def test_jobs_of_one_adapter_publish_contiguous_versions(session_factory: SessionFactory) -> None:
    ids = [await make_queued_job(session_factory, suffix="bot") for _ in range(6)]
    replies = await asyncio.gather(*(publish_job(session_factory, job_id, job_id.encode()) for job_id in ids))
    assert sorted(reply.version for reply in replies) == [1, 2, 3, 4, 5, 6]


async def test_an_adapter_for_another_base_is_not_published(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    fence = (await claim_job(session_factory, job_id)).fence
    async with session_factory.begin() as session:
        with pytest.raises(ConflictError, match="another base"):
            await job_leases.publish(session, job_id, make_publish(fence, base_digest="0" * 64))


async def test_a_result_file_comes_with_the_success(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    fence = (await claim_job(session_factory, job_id)).fence
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        file = File(
            id="file-result",
            tenant_id=tenant,
            filename="step_metrics.csv",
            purpose="fine-tune-results",
            size_bytes=1,
            sha256="0" * 64,
            storage_key="files/x",
        )
        await job_leases.publish(session, job_id, make_publish(fence), file)
    assert (await read_job(session_factory, job_id)).result_file == "file-result"


async def test_of_cancel_and_success_the_first_wins(session_factory: SessionFactory) -> None:
    for _ in range(10):
        job_id = await make_queued_job(session_factory)
        fence = (await claim_job(session_factory, job_id)).fence

        async def cancel(job_id: str = job_id) -> str:
            async with session_factory.begin() as session:
                return (await jobs.request_cancel(session, await make_tenant(session), job_id)).status

        async def publish(job_id: str = job_id, fence: int = fence) -> Any:
            async with session_factory.begin() as session:
                return await job_leases.publish(session, job_id, make_publish(fence, job_id.encode()))

        outcomes: tuple[Any, Any] = await asyncio.gather(cancel(), publish(), return_exceptions=True)
        status, reply = outcomes
        job = await read_job(session_factory, job_id)
        if status == "succeeded":
            assert job.result_version == reply.version_id
        else:
            assert status == "running" and isinstance(reply, JobCancelledError)
            assert (await end_job(session_factory, job_id, fence, "cancelled")).status == "cancelled"


async def test_a_lost_worker_returns_the_job_with_growing_patience(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    for expected in (1, 2):
        await make_due(session_factory)
        await claim_job(session_factory, job_id)
        assert await expire(session_factory) == [job_id]
        job = await read_job(session_factory, job_id)
        assert (job.status, job.no_progress, job.worker_id) == ("queued", expected, None)
        with pytest.raises(NotClaimableError, match="waits"):
            await claim_job(session_factory, job_id)
    await make_due(session_factory)
    await claim_job(session_factory, job_id)
    await expire(session_factory)
    job = await read_job(session_factory, job_id)
    assert (job.status, job.error_code) == ("failed", "worker_crash_loop")
    assert await expire(session_factory) == []


async def test_progress_forgives_earlier_crashes(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    for step in (1, 2, 3, 4):
        lease = await claim_job(session_factory, job_id)
        await send_beat(session_factory, job_id, make_beat(lease.fence, step))
        await expire(session_factory)
        assert (await read_job(session_factory, job_id)).no_progress == 0


async def test_an_expired_lease_ends_as_the_customer_asked(session_factory: SessionFactory) -> None:
    for request, status in ((jobs.request_cancel, "cancelled"), (jobs.request_pause, "paused")):
        job_id = await make_queued_job(session_factory)
        await claim_job(session_factory, job_id)
        async with session_factory.begin() as session:
            await request(session, await make_tenant(session), job_id)
        await expire(session_factory)
        assert (await read_job(session_factory, job_id)).status == status


async def test_a_worker_ends_a_job_in_each_way(session_factory: SessionFactory) -> None:
    for outcome, status in (("failed", "failed"), ("cancelled", "cancelled"), ("paused", "paused")):
        job_id = await make_queued_job(session_factory)
        fence = (await claim_job(session_factory, job_id)).fence
        await send_beat(session_factory, job_id, make_beat(fence, 2))
        job = await end_job(session_factory, job_id, fence, outcome, code="training_diverged", message="NaN")
        assert job.status == status
        assert job.error_code == ("training_diverged" if outcome == "failed" else None)
        async with session_factory.begin() as session:
            usage = await session.get(UsageRecord, job_id)
        assert (usage is None) == (outcome == "paused"), "what was computed is billed at the end"


async def test_a_release_in_good_order_is_no_crash(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    for _ in range(4):
        fence = (await claim_job(session_factory, job_id)).fence
        job = await end_job(session_factory, job_id, fence, "released")
        assert (job.status, job.no_progress) == ("queued", 0)


async def test_a_release_with_a_code_counts_like_a_crash(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    for expected in ("queued", "queued", "failed"):
        await make_due(session_factory)
        fence = (await claim_job(session_factory, job_id)).fence
        job = await end_job(
            session_factory, job_id, fence, "released", code="storage_error", message="S3 503"
        )
        assert job.status == expected
    assert job.error_message is not None and "S3 503" in job.error_message


async def test_a_queued_job_is_sent_to_the_finetune_queue_when_due(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    await claim_job(session_factory, job_id)
    await expire(session_factory)
    async with session_factory.begin() as session:
        job = await session.get_one(FtJob, job_id)
        sends = list(await session.scalars(select(Outbox).order_by(Outbox.id)))
    assert [(each.topic, each.key) for each in sends] == [("finetune", job_id)] * 2
    assert abs((sends[1].due_at - job.next_run_at).total_seconds()) < 1


async def test_reclaimers_do_not_wait_for_each_other(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    await claim_job(session_factory, job_id, lease_s=-1)
    async with session_factory.begin() as first:
        assert await job_leases.reclaim_expired(first) == [job_id]
        async with session_factory.begin() as second:
            assert await job_leases.reclaim_expired(second) == []


def test_backoff_doubles_up_to_five_minutes() -> None:
    assert backoff_s(0) == 0
    for n in (1, 2, 5, 20):
        assert 0.5 * min(2**n, 300) <= backoff_s(n) <= min(2**n, 300)


async def test_a_dataset_of_the_job_is_not_shared_with_its_validation(
    session_factory: SessionFactory,
) -> None:
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        validation = await make_file(session, tenant)
    job_id = await make_queued_job(session_factory, validation_file=validation)
    async with session_factory.begin() as session:
        values = {
            "validation_data": {**DATASET.model_dump(), "key": "datasets/y"},
            "base_digest": BASE_DIGEST,
        }
        await session.execute(update(FtJob).where(FtJob.id == job_id).values(values))
    lease = await claim_job(session_factory, job_id)
    assert lease.validation is not None and lease.validation.key == "datasets/y"
