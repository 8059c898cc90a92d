"""Jobs as their owner sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from shared import jobs
from shared.db import SessionFactory
from shared.errors import (
    ConflictError,
    IdempotencyMismatchError,
    InvalidRequestError,
    LimitExceededError,
    NotFoundError,
)
from shared.messages import TrainSpec
from shared.models import JOB_STATUSES, BgTask, FtJob, FtTransition, Outbox
from tests.records import claim_job, make_file, make_job, make_queued_job, make_tenant


async def test_a_created_job_validates_its_files_first(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        job = await make_job(session, tenant, suffix="My Bot", metadata={"team": "a"})
    async with session_factory.begin() as session:
        seen = await jobs.get_job(session, tenant, job.id)
        assert (seen.status, seen.adapter_name, seen.metadata_) == (
            "validating_files",
            "my-bot",
            {"team": "a"},
        )
        task = (await session.scalars(select(BgTask))).one()
        assert (task.kind, task.ref) == ("validate_dataset", job.id)
        events = await jobs.list_events(session, tenant, job.id)
        assert events.items[-1].message == f"Created fine-tuning job: {job.id}"


async def test_a_rolled_back_request_leaves_no_job_and_no_task(session_factory: SessionFactory) -> None:
    async with session_factory() as session:
        await make_job(session, await make_tenant(session))
        await session.rollback()
    async with session_factory.begin() as session:
        assert await session.scalar(select(func.count()).select_from(FtJob)) == 0
        assert await session.scalar(select(func.count()).select_from(BgTask)) == 0


async def create_same(factory: SessionFactory, tenant: str, **fields: Any) -> jobs.CreatedJob:
    values = {"base_model": "tiny", "spec": TrainSpec(), "request_hash": "same", **fields}
    async with factory.begin() as session:
        return await jobs.create_job(session, tenant, jobs.NewJob(**values))


async def make_owner(factory: SessionFactory, slug: str = "acme") -> tuple[str, str]:
    async with factory.begin() as session:
        tenant = await make_tenant(session, slug)
        return tenant, await make_file(session, tenant)


async def test_the_same_request_at_once_makes_one_job(session_factory: SessionFactory) -> None:
    tenant, file = await make_owner(session_factory)
    created = await asyncio.gather(
        *(create_same(session_factory, tenant, training_file=file) for _ in range(8))
    )
    assert len({each.job.id for each in created}) == 1
    assert sum(each.is_new for each in created) == 1


async def test_an_idempotency_key_names_one_job(session_factory: SessionFactory) -> None:
    tenant, file = await make_owner(session_factory)
    created = await asyncio.gather(
        *(create_same(session_factory, tenant, training_file=file, idempotency_key="k") for _ in range(8))
    )
    assert len({each.job.id for each in created}) == 1
    assert sum(each.is_new for each in created) == 1
    other = await create_same(session_factory, tenant, training_file=file, idempotency_key="k2")
    assert other.is_new
    with pytest.raises(IdempotencyMismatchError):
        await create_same(
            session_factory, tenant, training_file=file, idempotency_key="k", request_hash="another"
        )


async def test_an_idempotency_key_is_forgotten_after_a_day(session_factory: SessionFactory) -> None:
    tenant, file = await make_owner(session_factory)
    first = await create_same(session_factory, tenant, training_file=file, idempotency_key="k")
    async with session_factory.begin() as session:
        await session.execute(text("UPDATE idempotency SET created_at = created_at - interval '25 hours'"))
    again = await create_same(session_factory, tenant, training_file=file, idempotency_key="k")
    assert again.is_new and again.job.id != first.job.id


async def test_the_same_body_makes_a_new_job_later_elsewhere_or_after_an_end(
    session_factory: SessionFactory,
) -> None:
    tenant, file = await make_owner(session_factory)
    first = await create_same(session_factory, tenant, training_file=file)
    other_tenant, other_file = await make_owner(session_factory, "other")
    assert (await create_same(session_factory, other_tenant, training_file=other_file)).is_new
    async with session_factory.begin() as session:
        await jobs.request_cancel(session, tenant, first.job.id)
    second = await create_same(session_factory, tenant, training_file=file)
    assert second.is_new
    async with session_factory.begin() as session:
        await session.execute(
            update(FtJob)
            .where(FtJob.id == second.job.id)
            .values(created_at=FtJob.created_at - text("interval '1 minute'"))
        )
    assert (await create_same(session_factory, tenant, training_file=file)).is_new


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"training_file": "file-none"}, NotFoundError, "training_file"),
        ({"validation_file": "file-none"}, NotFoundError, "validation_file"),
        ({"suffix": "///"}, InvalidRequestError, "suffix"),
    ],
)
async def test_a_request_that_cannot_be_run_is_refused_by_its_field(
    session_factory: SessionFactory, fields: dict[str, Any], error: type[Exception], param: str
) -> None:
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        with pytest.raises(error) as caught:
            await make_job(session, tenant, **fields)
        assert getattr(caught.value, "param", None) == param


async def test_a_file_of_another_purpose_or_tenant_is_no_training_file(
    session_factory: SessionFactory,
) -> None:
    async with session_factory.begin() as session:
        tenant, other = await make_tenant(session), await make_tenant(session, "other")
        batch = await make_file(session, tenant, purpose="batch")
        foreign = await make_file(session, other)
        with pytest.raises(InvalidRequestError, match="purpose"):
            await make_job(session, tenant, training_file=batch)
        with pytest.raises(NotFoundError):
            await make_job(session, tenant, training_file=foreign)


async def test_unfinished_jobs_are_bounded(
    session_factory: SessionFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_UNFINISHED_JOBS", 2)
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        first = await make_job(session, tenant)
        await make_job(session, tenant)
        with pytest.raises(LimitExceededError):
            await make_job(session, tenant)
        await jobs.request_cancel(session, tenant, first.id)
        await make_job(session, tenant)


async def test_jobs_are_listed_newest_first_page_by_page(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        tenant, other = await make_tenant(session), await make_tenant(session, "other")
        made = [(await make_job(session, tenant, metadata={"n": str(n)})).id for n in range(5)]
        foreign = await make_job(session, other)
        page = await jobs.list_jobs(session, tenant, limit=2)
        assert [job.id for job in page.items] == [made[4], made[3]] and page.has_more
        page = await jobs.list_jobs(session, tenant, limit=3, after=made[3])
        assert [job.id for job in page.items] == [made[2], made[1], made[0]] and not page.has_more
        page = await jobs.list_jobs(session, tenant, metadata={"n": "3"})
        assert [job.id for job in page.items] == [made[3]]
        assert (await jobs.list_jobs(session, tenant, without_metadata=True)).items == []
        with pytest.raises(NotFoundError):
            await jobs.list_jobs(session, tenant, after=foreign.id)


Request = Callable[[AsyncSession, str, str], Awaitable[FtJob]]


async def test_a_job_of_another_tenant_is_not_found(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    requests: list[Request] = [
        jobs.get_job,
        jobs.request_cancel,
        jobs.request_pause,
        jobs.request_resume,
    ]
    for request in requests:
        async with session_factory.begin() as session:
            other = await make_tenant(session, "other")
            with pytest.raises(NotFoundError):
                await request(session, other, job_id)
    async with session_factory.begin() as session:
        for read in (jobs.list_events, jobs.list_checkpoints):
            with pytest.raises(NotFoundError):
                await read(session, other, job_id)


async def ask(factory: SessionFactory, request: Request, job_id: str) -> FtJob:
    async with factory.begin() as session:
        return await request(session, await make_tenant(session), job_id)


async def test_a_queued_job_pauses_resumes_and_cancels_at_once(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    assert (await ask(session_factory, jobs.request_pause, job_id)).status == "paused"
    assert (await ask(session_factory, jobs.request_pause, job_id)).status == "paused"
    assert (await ask(session_factory, jobs.request_resume, job_id)).status == "queued"
    assert (await ask(session_factory, jobs.request_resume, job_id)).status == "queued"
    async with session_factory.begin() as session:
        sent = list(await session.scalars(select(Outbox.key)))
        assert sent == [job_id, job_id], "queued twice, so sent twice"
    job = await ask(session_factory, jobs.request_cancel, job_id)
    assert job.status == "cancelled" and job.finished_at is not None
    assert (await ask(session_factory, jobs.request_cancel, job_id)).status == "cancelled"
    for request in (jobs.request_pause, jobs.request_resume):
        with pytest.raises(ConflictError, match="cancelled"):
            await ask(session_factory, request, job_id)


async def test_a_running_job_is_asked_and_answers_for_itself(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    await claim_job(session_factory, job_id)
    job = await ask(session_factory, jobs.request_pause, job_id)
    assert (job.status, job.pause_requested) == ("running", True)
    job = await ask(session_factory, jobs.request_resume, job_id)
    assert (job.status, job.pause_requested) == ("running", False)
    job = await ask(session_factory, jobs.request_cancel, job_id)
    assert (job.status, job.cancel_requested) == ("running", True)


async def test_a_job_whose_worker_is_gone_cancels_at_once(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    await claim_job(session_factory, job_id, lease_s=-1)
    assert (await ask(session_factory, jobs.request_cancel, job_id)).status == "cancelled"


async def test_only_legal_moves_pass_the_database(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        legal = {tuple(row) for row in await session.execute(select(FtTransition.src, FtTransition.dst))}
        tenant = await make_tenant(session)
        job = await make_job(session, tenant)
    allowed, connection = set(), session_factory.kw["bind"]
    for src in JOB_STATUSES:
        for dst in JOB_STATUSES:
            if src != dst and await moves(connection, job.id, src, dst):
                allowed.add((src, dst))
    assert allowed == legal


async def moves(engine: Any, job_id: str, src: str, dst: str) -> bool:
    """Tries the move with every other rule of the row out of the way, and takes it back."""
    async with engine.connect() as connection:
        for constraint in ("ck_ft_job_worker", "ck_ft_job_result"):
            await connection.execute(text(f"ALTER TABLE ft_job DROP CONSTRAINT {constraint}"))
        await connection.execute(text("ALTER TABLE ft_job DISABLE TRIGGER ft_job_guard"))
        await connection.execute(text("UPDATE ft_job SET status = :s WHERE id = :i"), {"s": src, "i": job_id})
        await connection.execute(text("ALTER TABLE ft_job ENABLE TRIGGER ft_job_guard"))
        try:
            await connection.execute(
                text("UPDATE ft_job SET status = :s WHERE id = :i"), {"s": dst, "i": job_id}
            )
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != "CS001":
                raise
            return False
        finally:
            await connection.rollback()
    return True


async def test_a_fence_never_goes_back_and_what_is_over_never_changes(
    session_factory: SessionFactory,
) -> None:
    job_id = await make_queued_job(session_factory)
    await claim_job(session_factory, job_id)
    with pytest.raises(DBAPIError, match="went back"):
        async with session_factory.begin() as session:
            await session.execute(update(FtJob).values(fence=0))
    second = await make_queued_job(session_factory)
    await ask(session_factory, jobs.request_cancel, second)
    with pytest.raises(DBAPIError, match="is over"):
        async with session_factory.begin() as session:
            await session.execute(update(FtJob).where(FtJob.id == second).values(step=7))
