"""Tenants with what belongs to them, and the audit log."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from services.adapter_store import repository
from shared.errors import NotFoundError
from shared.models import Adapter, ApiKey, AuditLog, FtJob, Tenant


@dataclass(frozen=True, slots=True)
class TenantRow:
    tenant: Tenant
    num_keys: int  # that are not revoked
    num_jobs: int
    num_adapters: int


@dataclass(frozen=True, slots=True)
class AuditRow:
    line: AuditLog
    org: str


async def list_tenants(session: AsyncSession) -> list[TenantRow]:
    query = select(
        Tenant,
        count_of(ApiKey.tenant_id).where(ApiKey.revoked_at.is_(None)).scalar_subquery(),
        count_of(FtJob.tenant_id).scalar_subquery(),
        count_of(Adapter.tenant_id).scalar_subquery(),
    ).order_by(Tenant.name, Tenant.slug)
    return [TenantRow(*row) for row in await session.execute(query)]


def count_of(tenant_id: InstrumentedAttribute[str]) -> Select[int]:
    """Rows of the tenant in the outer query."""
    return select(func.count()).where(tenant_id == Tenant.id).correlate(Tenant)


async def list_orgs(session: AsyncSession) -> list[str]:
    return [tenant.slug for tenant in await repository.list_tenants(session)]


async def get_tenant(session: AsyncSession, org: str) -> Tenant:
    tenant = await session.scalar(select(Tenant).where(Tenant.slug == org))
    if tenant is None:
        raise NotFoundError(f"There is no tenant {org}.")
    return tenant


async def list_audit(
    session: AsyncSession,
    *,
    org: str = "",
    action: str = "",
    object_id: str = "",
    before: int | None = None,
    limit: int = 50,
) -> list[AuditRow]:
    """Newest first; `before` is the id of the last line of the page before."""
    query = select(AuditLog, Tenant.slug).join(Tenant, Tenant.id == AuditLog.tenant_id)
    if org:
        query = query.where(Tenant.slug == org)
    if action:
        query = query.where(AuditLog.action == action)
    if object_id:
        query = query.where(AuditLog.object_id == object_id)
    if before is not None:
        query = query.where(AuditLog.id < before)
    return [AuditRow(*row) for row in await session.execute(query.order_by(AuditLog.id.desc()).limit(limit))]


async def list_actions(session: AsyncSession) -> list[str]:
    return list(await session.scalars(select(AuditLog.action).distinct().order_by(AuditLog.action)))
