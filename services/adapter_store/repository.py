"""Reads of the registry for its JSON API and for people.

Every function takes the tenant first; None means all tenants and is for the operator's pages only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from shared.errors import NotFoundError
from shared.models import (
    Adapter,
    AdapterAlias,
    AdapterVersion,
    ApiKey,
    AuditLog,
    FtEvent,
    FtJob,
    FtMetric,
    Tenant,
    UsageRecord,
)

TenantFilter = str | None
Row = TypeVar("Row", Adapter, AdapterVersion, ApiKey, AuditLog, FtJob, FtMetric, FtEvent)


def scoped(query: Select[Row], table: type[Row], tenant_id: TenantFilter) -> Select[Row]:
    return query if tenant_id is None else query.where(table.tenant_id == tenant_id)


async def list_tenants(session: AsyncSession) -> list[Tenant]:
    return list(await session.scalars(select(Tenant).order_by(Tenant.slug)))


async def list_adapters(session: AsyncSession, tenant_id: TenantFilter) -> list[Adapter]:
    query = scoped(select(Adapter), Adapter, tenant_id)
    return list(await session.scalars(query.order_by(Adapter.created_at, Adapter.id)))


async def list_versions(
    session: AsyncSession, tenant_id: TenantFilter, adapter_id: str | None = None
) -> list[AdapterVersion]:
    """Newest first, of one adapter or of all."""
    query = scoped(select(AdapterVersion), AdapterVersion, tenant_id)
    if adapter_id is not None:
        query = query.where(AdapterVersion.adapter_id == adapter_id)
    return list(await session.scalars(query.order_by(AdapterVersion.created_at.desc(), AdapterVersion.id)))


async def aliases_of(session: AsyncSession, adapters: Sequence[Adapter]) -> dict[str, list[AdapterAlias]]:
    """By the adapter's id, in the order of their names."""
    query = select(AdapterAlias).where(AdapterAlias.adapter_id.in_([adapter.id for adapter in adapters]))
    found: dict[str, list[AdapterAlias]] = {adapter.id: [] for adapter in adapters}
    for alias in await session.scalars(query.order_by(AdapterAlias.name)):
        found[alias.adapter_id].append(alias)
    return found


async def list_jobs(
    session: AsyncSession,
    tenant_id: TenantFilter,
    *,
    statuses: Sequence[str] = (),
    limit: int = 50,
    offset: int = 0,
) -> list[FtJob]:
    """Newest first."""
    query = scoped(select(FtJob), FtJob, tenant_id)
    if statuses:
        query = query.where(FtJob.status.in_(statuses))
    return list(await session.scalars(query.order_by(FtJob.seq.desc()).limit(limit).offset(offset)))


async def get_job(session: AsyncSession, tenant_id: TenantFilter, job_id: str) -> FtJob:
    query = scoped(select(FtJob), FtJob, tenant_id).where(FtJob.id == job_id)
    job = (await session.scalars(query)).first()
    if job is None:
        raise NotFoundError(f"no fine-tuning job {job_id!r}")
    return job


async def job_metrics(
    session: AsyncSession, tenant_id: TenantFilter, job_id: str, *, after_step: int = -1
) -> list[FtMetric]:
    """The series of a job's steps, in order."""
    query = scoped(select(FtMetric), FtMetric, tenant_id)
    query = query.where(FtMetric.job_id == job_id, FtMetric.step > after_step)
    return list(await session.scalars(query.order_by(FtMetric.step)))


async def job_events(
    session: AsyncSession, tenant_id: TenantFilter, job_id: str, *, limit: int = 100
) -> list[FtEvent]:
    """Newest first."""
    query = scoped(select(FtEvent), FtEvent, tenant_id).where(FtEvent.job_id == job_id)
    return list(await session.scalars(query.order_by(FtEvent.seq.desc()).limit(limit)))


async def count_jobs(session: AsyncSession, tenant_id: TenantFilter) -> dict[str, int]:
    """By status."""
    query = select(FtJob.status, func.count().label("jobs")).group_by(FtJob.status)
    if tenant_id is not None:
        query = query.where(FtJob.tenant_id == tenant_id)
    return {row.status: row.jobs for row in await session.execute(query)}


async def list_audit(
    session: AsyncSession, tenant_id: TenantFilter, *, limit: int = 100, before: int | None = None
) -> list[AuditLog]:
    """Newest first; `before` is the id of the last line of the page before."""
    query = scoped(select(AuditLog), AuditLog, tenant_id)
    if before is not None:
        query = query.where(AuditLog.id < before)
    return list(await session.scalars(query.order_by(AuditLog.id.desc()).limit(limit)))


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one tenant and model."""

    tenant_id: str
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    trained_tokens: int


async def sum_usage(session: AsyncSession, tenant_id: TenantFilter) -> list[Usage]:
    query = select(
        UsageRecord.tenant_id,
        UsageRecord.model,
        func.count(),
        func.sum(UsageRecord.prompt_tokens),
        func.sum(UsageRecord.completion_tokens),
        func.sum(UsageRecord.trained_tokens),
    ).group_by(UsageRecord.tenant_id, UsageRecord.model)
    if tenant_id is not None:
        query = query.where(UsageRecord.tenant_id == tenant_id)
    rows = await session.execute(query.order_by(UsageRecord.tenant_id, UsageRecord.model))
    return [Usage(row[0], row[1], *map(int, row[2:])) for row in rows]
