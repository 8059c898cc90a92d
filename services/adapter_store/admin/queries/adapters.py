"""Adapters, their versions and aliases, over all tenants, with what they have served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from shared.db import now
from shared.errors import NotFoundError
from shared.models import Adapter, AdapterAlias, AdapterVersion, FtJob, Tenant, UsageRecord
from shared.registry import LIVE

USAGE_WINDOW = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class AdapterRow:
    adapter: Adapter
    org: str
    live: AdapterVersion | None
    canary: AdapterVersion | None
    canary_percent: int | None
    num_versions: int
    last_published: datetime | None
    requests: int  # within USAGE_WINDOW, by all versions


@dataclass(frozen=True, slots=True)
class VersionUsage:
    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class AliasRow:
    alias: AdapterAlias
    version: AdapterVersion
    previous: AdapterVersion | None
    canary: AdapterVersion | None


@dataclass(frozen=True, slots=True)
class AdapterPage:
    """`versions` are newest first."""

    adapter: Adapter
    tenant: Tenant
    versions: list[AdapterVersion]
    aliases: list[AliasRow]
    usage: dict[str, VersionUsage] = field(default_factory=dict)

    @property
    def live(self) -> AliasRow | None:
        return next((row for row in self.aliases if row.alias.name == LIVE), None)

    def used(self, version: AdapterVersion) -> VersionUsage:
        return self.usage.get(version.id, VersionUsage())

    def aliases_of(self, version: AdapterVersion) -> list[str]:
        return [row.alias.name for row in self.aliases if row.alias.version_id == version.id]

    def canaries_of(self, version: AdapterVersion) -> list[AdapterAlias]:
        return [row.alias for row in self.aliases if row.alias.canary_version_id == version.id]

    def find_version(self, number: int | None) -> AdapterVersion | None:
        return next((version for version in self.versions if version.version == number), None)

    def parent_of(self, version: AdapterVersion) -> AdapterVersion | None:
        return next((other for other in self.versions if other.id == version.parent_id), None)


async def list_adapters(
    session: AsyncSession, *, org: str = "", words: str = "", limit: int = 200
) -> list[AdapterRow]:
    """Last published first."""
    live, canary = aliased(AdapterVersion), aliased(AdapterVersion)
    counted = (
        select(
            AdapterVersion.adapter_id,
            func.count().label("num_versions"),
            func.max(AdapterVersion.created_at).label("last_published"),
        )
        .group_by(AdapterVersion.adapter_id)
        .subquery()
    )
    query = (
        select(
            *(Adapter, Tenant.slug, live, canary, AdapterAlias.canary_percent),
            *(func.coalesce(counted.c.num_versions, 0), counted.c.last_published),
        )
        .join(Tenant, Tenant.id == Adapter.tenant_id)
        .outerjoin(counted, counted.c.adapter_id == Adapter.id)
        .outerjoin(AdapterAlias, (AdapterAlias.adapter_id == Adapter.id) & (AdapterAlias.name == LIVE))
        .outerjoin(live, live.id == AdapterAlias.version_id)
        .outerjoin(canary, canary.id == AdapterAlias.canary_version_id)
        .order_by(counted.c.last_published.desc().nulls_last(), Adapter.name)
        .limit(limit)
    )
    if org:
        query = query.where(Tenant.slug == org)
    if words:
        query = query.where(Adapter.name.icontains(words, autoescape=True))
    rows = (await session.execute(query)).all()
    requests = await count_requests(session, {row[0].tenant_id for row in rows})
    return [make_row(row, requests.get(row[0].id, 0)) for row in rows]


def make_row(row: Sequence[Any], requests: int) -> AdapterRow:
    adapter, org, live, canary, canary_percent, num_versions, last_published = row
    return AdapterRow(adapter, org, live, canary, canary_percent, num_versions, last_published, requests)


async def count_requests(session: AsyncSession, tenant_ids: set[str]) -> dict[str, int]:
    """Of each adapter that has served any within the window."""
    query = (
        select(AdapterVersion.adapter_id, func.count().label("requests"))
        .join(UsageRecord, UsageRecord.version_id == AdapterVersion.id)
        .where(
            UsageRecord.tenant_id.in_(tenant_ids),
            UsageRecord.kind == "inference",
            UsageRecord.created_at > now() - USAGE_WINDOW,
        )
        .group_by(AdapterVersion.adapter_id)
    )
    return {row.adapter_id: row.requests for row in await session.execute(query)}


async def get_adapter(session: AsyncSession, adapter_id: str, *, lock: bool = False) -> Adapter:
    adapter = await session.get(Adapter, adapter_id, with_for_update=lock)
    if adapter is None:
        raise NotFoundError(f"There is no adapter {adapter_id}.")
    return adapter


async def get_adapter_page(session: AsyncSession, adapter_id: str) -> AdapterPage:
    adapter = await get_adapter(session, adapter_id)
    versions = list(
        await session.scalars(
            select(AdapterVersion)
            .where(AdapterVersion.adapter_id == adapter_id)
            .order_by(AdapterVersion.version.desc())
        )
    )
    return AdapterPage(
        adapter=adapter,
        tenant=await session.get_one(Tenant, adapter.tenant_id),
        versions=versions,
        aliases=await list_aliases(session, adapter_id, versions),
        usage=await read_usage(session, adapter, versions),
    )


async def list_aliases(
    session: AsyncSession, adapter_id: str, versions: list[AdapterVersion]
) -> list[AliasRow]:
    """`live` first."""
    by_id: dict[str | None, AdapterVersion] = {version.id: version for version in versions}
    query = select(AdapterAlias).where(AdapterAlias.adapter_id == adapter_id)
    query = query.order_by((AdapterAlias.name != LIVE), AdapterAlias.name)
    return [
        AliasRow(
            alias=alias,
            version=by_id[alias.version_id],
            previous=by_id.get(alias.previous_version_id),
            canary=by_id.get(alias.canary_version_id),
        )
        for alias in await session.scalars(query)
    ]


async def read_usage(
    session: AsyncSession, adapter: Adapter, versions: list[AdapterVersion]
) -> dict[str, VersionUsage]:
    """Within the window, by version."""
    tokens = func.sum(UsageRecord.prompt_tokens + UsageRecord.completion_tokens)
    query = (
        select(UsageRecord.version_id, func.count(), tokens)
        .where(
            UsageRecord.tenant_id == adapter.tenant_id,
            UsageRecord.version_id.in_([version.id for version in versions]),
            UsageRecord.kind == "inference",
            UsageRecord.created_at > now() - USAGE_WINDOW,
        )
        .group_by(UsageRecord.version_id)
    )
    return {
        str(version_id): VersionUsage(count, int(total))
        for version_id, count, total in await session.execute(query)
    }


async def count_adapters(session: AsyncSession) -> tuple[int, int]:
    """Adapters, and versions that can be served."""
    adapters = await session.scalar(select(func.count()).select_from(Adapter))
    ready = await session.scalar(select(func.count()).where(AdapterVersion.state == "READY"))
    return adapters or 0, ready or 0


async def find_adapter_of_job(session: AsyncSession, job: FtJob) -> tuple[str, AdapterVersion | None] | None:
    """The id of the adapter that the job's name belongs to, and the version that the job made."""
    query = (
        select(Adapter.id, AdapterVersion)
        .outerjoin(
            AdapterVersion, (AdapterVersion.adapter_id == Adapter.id) & (AdapterVersion.source_job == job.id)
        )
        .where(Adapter.tenant_id == job.tenant_id, Adapter.name == job.adapter_name)
    )
    row = (await session.execute(query)).one_or_none()
    return None if row is None else (row[0], row[1])


async def list_newest_versions(
    session: AsyncSession, limit: int = 6
) -> list[tuple[AdapterVersion, Adapter, str]]:
    query = (
        select(AdapterVersion, Adapter, Tenant.slug)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .join(Tenant, Tenant.id == Adapter.tenant_id)
        .where(or_(AdapterVersion.state == "READY", AdapterVersion.state == "RETIRED"))
        .order_by(AdapterVersion.created_at.desc())
        .limit(limit)
    )
    return [(row[0], row[1], row[2]) for row in await session.execute(query)]
