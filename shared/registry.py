"""Which adapter version a model name means to a tenant. `shared.versions` changes what stands here.

A request's model name is one of
    ft:<base>:<org>:<adapter>:<short id>   one version
    <org>/<adapter>                        the version that the alias `live` points to
    <org>/<adapter>@<alias or number>      another alias, or one version
and is resolved once, at admission. Only READY versions are served.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from shared.messages import AdapterRef
from shared.models import Adapter, AdapterAlias, AdapterVersion, Tenant

LIVE = "live"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name under which a version is served to its tenant."""

    name: str
    version: AdapterVersion
    created_at: datetime

    @property
    def ref(self) -> AdapterRef:
        return ref_of(self.version)


def ref_of(version: AdapterVersion) -> AdapterRef:
    """What a request needs to know of the version that serves it."""
    peft = version.hyperparameters.get("peft", {})
    return AdapterRef(
        version_id=version.id,
        digest=version.digest,
        num_virtual_tokens=peft.get("num_virtual_tokens", 0),
    )


async def resolve_model(
    session: AsyncSession, tenant_id: str, name: str, *, base_digest: str | None = None
) -> AdapterRef | None:
    """The version to serve under `name`, or None: an unknown name is never the base model.

    With `base_digest`, versions trained on another base are unknown too.
    """
    version = await find_model(session, tenant_id, name)
    if version is None or (base_digest is not None and version.base_digest != base_digest):
        return None
    return ref_of(version)


async def find_model(session: AsyncSession, tenant_id: str, name: str) -> AdapterVersion | None:
    if "/" not in name or name.startswith("ft:"):
        return await first(session, ready_versions(tenant_id).where(AdapterVersion.model_name == name))
    org, _, rest = name.partition("/")
    adapter_name, _, selector = rest.partition("@")
    query = (
        ready_versions(tenant_id)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .join(Tenant, Tenant.id == AdapterVersion.tenant_id)
        .where(Tenant.slug == org, Adapter.name == adapter_name)
    )
    if selector.isascii() and selector.isdigit() and len(selector) < 10:
        return await first(session, query.where(AdapterVersion.version == int(selector)))
    if "@" in rest and not selector:
        return None
    return await find_aliased(session, query, selector or LIVE)


async def first(session: AsyncSession, query: Select[AdapterVersion]) -> AdapterVersion | None:
    return (await session.scalars(query)).first()


async def find_aliased(
    session: AsyncSession, query: Select[AdapterVersion], alias_name: str
) -> AdapterVersion | None:
    """Where the alias has a canary, each call draws anew."""
    found = await session.execute(
        query.add_columns(AdapterAlias)
        .join(AdapterAlias, AdapterAlias.adapter_id == AdapterVersion.adapter_id)
        .where(
            AdapterAlias.name == alias_name,
            AdapterVersion.id.in_([AdapterAlias.version_id, AdapterAlias.canary_version_id]),
        )
    )
    rows = found.all()
    if not rows:
        return None
    alias = rows[0][1]
    versions: dict[str, AdapterVersion] = {version.id: version for version, _ in rows}
    if alias.canary_version_id in versions and random.random() * 100 < alias.canary_percent:
        return versions[alias.canary_version_id]
    return versions.get(alias.version_id)


def ready_versions(tenant_id: str) -> Select[AdapterVersion]:
    return select(AdapterVersion).where(
        AdapterVersion.tenant_id == tenant_id, AdapterVersion.state == "READY"
    )


async def list_models(
    session: AsyncSession, tenant_id: str, *, base_digest: str | None = None
) -> list[ServedModel]:
    """Every name of a READY version, oldest first: its own, and `<org>/<adapter>` of the live one."""
    query = ready_versions(tenant_id).order_by(AdapterVersion.created_at, AdapterVersion.id)
    if base_digest is not None:
        query = query.where(AdapterVersion.base_digest == base_digest)
    versions = {version.id: version for version in await session.scalars(query)}
    names = [ServedModel(version.model_name, version, version.created_at) for version in versions.values()]
    aliases = (
        select(AdapterAlias, Adapter.name, Tenant.slug)
        .join(Adapter, Adapter.id == AdapterAlias.adapter_id)
        .join(Tenant, Tenant.id == Adapter.tenant_id)
        .where(AdapterAlias.tenant_id == tenant_id, AdapterAlias.name == LIVE)
        .order_by(Adapter.created_at)
    )
    for alias, adapter_name, slug in await session.execute(aliases):
        if alias.version_id in versions:
            version = versions[alias.version_id]
            names.append(ServedModel(f"{slug}/{adapter_name}", version, alias.updated_at))
    return names
