"""What the operator's pages read: one tenant's rows, or everybody's."""

from __future__ import annotations

import pytest

from services.adapter_store import repository
from shared import job_leases
from shared.db import SessionFactory
from shared.errors import NotFoundError
from shared.messages import BeatRequest, StepMetrics
from shared.usage import InferenceUsage, record_inference
from tests.records import claim_job, make_queued_job, make_tenant, publish_job


async def test_every_read_is_one_tenants_or_everybodys(session_factory: SessionFactory) -> None:
    ids = {}
    for slug in ("acme", "other"):
        job_id = await make_queued_job(session_factory, slug, suffix="bot")
        await publish_job(session_factory, job_id, slug.encode())
        ids[slug] = [job_id, await make_queued_job(session_factory, slug, suffix="bot")]
    async with session_factory.begin() as session:
        acme = await make_tenant(session)
        assert [tenant.slug for tenant in await repository.list_tenants(session)] == ["acme", "other"]
        for tenant, count in ((acme, 1), (None, 2)):
            adapters = await repository.list_adapters(session, tenant)
            aliases = await repository.aliases_of(session, adapters)
            assert len(adapters) == count
            assert all([alias.name for alias in aliases[each.id]] == ["live"] for each in adapters)
            assert len(await repository.list_versions(session, tenant)) == count
            assert await repository.count_jobs(session, tenant) == {"succeeded": count, "queued": count}
            assert len(await repository.list_jobs(session, tenant, statuses=["queued"])) == count
            assert len(await repository.sum_usage(session, tenant)) == count
            audit = await repository.list_audit(session, tenant)
            assert {line.tenant_id for line in audit} == {each.tenant_id for each in adapters}
        jobs = await repository.list_jobs(session, acme)
        assert [job.id for job in jobs] == ids["acme"][::-1]
        assert [job.id for job in await repository.list_jobs(session, acme, limit=1, offset=1)] == [
            ids["acme"][0]
        ]
        assert (await repository.get_job(session, None, ids["other"][0])).status == "succeeded"
        with pytest.raises(NotFoundError):
            await repository.get_job(session, acme, ids["other"][0])


async def test_a_jobs_series_and_events_are_read_in_order(session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    fence = (await claim_job(session_factory, job_id)).fence
    metrics = tuple(StepMetrics(step=step, train_loss=1 / step) for step in (3, 1, 2))
    beat = BeatRequest(fence=fence, step=3, total_steps=9, metrics=metrics)
    async with session_factory.begin() as session:
        await job_leases.beat(session, job_id, beat, 60)
    async with session_factory.begin() as session:
        tenant, other = await make_tenant(session), await make_tenant(session, "other")
        series = await repository.job_metrics(session, tenant, job_id)
        assert [(row.step, row.train_loss) for row in series] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
        assert [row.step for row in await repository.job_metrics(session, None, job_id, after_step=2)] == [3]
        events = await repository.job_events(session, tenant, job_id, limit=1)
        assert [event.message for event in events] == ["Step 3/9: training loss=0.3333"]
        assert await repository.job_metrics(session, other, job_id) == []
        assert await repository.job_events(session, other, job_id) == []


async def test_usage_is_summed_by_tenant_and_model(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
        usages = [
            InferenceUsage(
                request_id=name, tenant_id=tenant, model="tiny", prompt_tokens=3, completion_tokens=2
            )
            for name in ("a", "b")
        ]
        await record_inference(session, usages)
        assert await repository.sum_usage(session, tenant) == [repository.Usage(tenant, "tiny", 2, 6, 4, 0)]
