"""Changes of the registry: publish a version, move an alias, roll it back, retire a version.

Each locks the adapter first, so that version numbers have no gap and aliases no lost move, and leaves an
audit line. A version's content never changes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from shared.audit import audit
from shared.db import now
from shared.errors import ConflictError, NotFoundError
from shared.ids import new_id
from shared.job_metrics import finite
from shared.messages import PublishRequest
from shared.models import Adapter, AdapterAlias, AdapterVersion, BaseModelRow, FtJob, Tenant
from shared.registry import LIVE

SHORT_ID_CHARS = 8


async def lock_adapter(session: AsyncSession, tenant_id: str, name: str) -> Adapter:
    """The adapter, made if need be and locked: its version numbers have no gap and no twin."""
    statement = insert(Adapter).values(id=new_id("adpt_"), tenant_id=tenant_id, name=name)
    statement = statement.on_conflict_do_update(
        index_elements=["tenant_id", "name"], set_={"name": statement.excluded.name}
    )
    result = await session.scalars(
        statement.returning(Adapter), execution_options={"populate_existing": True}
    )
    return result.one()


async def publish_version(
    session: AsyncSession, adapter: Adapter, job: FtJob, request: PublishRequest
) -> AdapterVersion:
    """The next version of a locked adapter. `live` moves when it is the first or the job asked for it."""
    number = await session.scalar(
        select(func.coalesce(func.max(AdapterVersion.version), 0) + 1).where(
            AdapterVersion.adapter_id == adapter.id
        )
    )
    base = await session.get_one(BaseModelRow, request.base_digest)
    version_id = new_id("ver_")
    version = AdapterVersion(
        id=version_id,
        tenant_id=job.tenant_id,
        adapter_id=adapter.id,
        version=number,
        state="READY",
        model_name=await version_name(session, job, version_id),
        digest=request.digest,
        files=request.files,
        size_bytes=request.size_bytes,
        base_model=job.base_model,
        base_digest=request.base_digest,
        tokenizer_digest=base.tokenizer_digest,
        dataset_digest=job.training_data["sha256"] if job.training_data else None,
        hyperparameters=job.spec,
        metrics={name: finite(value) for name, value in request.metrics.items()},
        trained_tokens=request.trained_tokens,
        source_job=job.id,
    )
    session.add(version)
    await session.flush()
    audit(session, job.tenant_id, f"job:{job.id}", "version.publish", version_id, version=number)
    live = await session.get(AdapterAlias, (adapter.id, LIVE))
    if live is None or job.promote:
        await move_alias(session, adapter, LIVE, version, actor=f"job:{job.id}")
    return version


async def version_name(session: AsyncSession, job: FtJob, version_id: str) -> str:
    tenant = await session.get_one(Tenant, job.tenant_id)
    suffix = job.adapter_name if job.suffix else ""
    short_id = version_id.removeprefix("ver_")[:SHORT_ID_CHARS]
    return f"ft:{job.base_model}:{tenant.slug}:{suffix}:{short_id}"


async def get_adapter(session: AsyncSession, tenant_id: str, name: str, *, lock: bool = False) -> Adapter:
    query = select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.name == name)
    adapter = await session.scalar(query.with_for_update() if lock else query)
    if adapter is None:
        raise NotFoundError(f"no adapter {name!r}")
    return adapter


async def get_version(session: AsyncSession, adapter: Adapter, number: int) -> AdapterVersion:
    query = select(AdapterVersion).where(
        AdapterVersion.adapter_id == adapter.id, AdapterVersion.version == number
    )
    version = await session.scalar(query)
    if version is None:
        raise NotFoundError(f"adapter {adapter.name!r} has no version {number}", param="version")
    return version


async def move_alias(
    session: AsyncSession,
    adapter: Adapter,
    name: str,
    version: AdapterVersion,
    *,
    actor: str,
    canary: AdapterVersion | None = None,
    canary_percent: int = 0,
) -> AdapterAlias:
    """Points the alias of a locked adapter at a READY version, and part of its traffic at another."""
    for each in (version, canary):
        if each is not None and each.state != "READY":
            raise ConflictError(
                f"version {each.version} is {each.state}, not READY", code="version_not_ready"
            )
    alias = await session.get(AdapterAlias, (adapter.id, name))
    if alias is None:
        alias = AdapterAlias(
            adapter_id=adapter.id, name=name, tenant_id=adapter.tenant_id, version_id=version.id
        )
        session.add(alias)
    elif alias.version_id != version.id:
        alias.previous_version_id, alias.version_id = alias.version_id, version.id
    alias.canary_version_id = canary.id if canary else None
    alias.canary_percent = canary_percent if canary else 0
    alias.updated_at = now()
    details: dict[str, Any] = {"alias": name, "version": version.version}
    if canary:
        details |= {"canary": canary.version, "canary_percent": canary_percent}
    audit(session, adapter.tenant_id, actor, "alias.move", adapter.id, **details)
    await session.flush()
    await session.refresh(alias)
    return alias


async def roll_back(session: AsyncSession, adapter: Adapter, name: str, *, actor: str) -> AdapterAlias:
    """Points the alias of a locked adapter where it pointed before its last move; ends a canary."""
    alias = await session.get(AdapterAlias, (adapter.id, name))
    if alias is None:
        raise NotFoundError(f"adapter {adapter.name!r} has no alias {name!r}")
    if alias.previous_version_id is None:
        raise ConflictError(f"alias {name!r} has not moved yet", code="nothing_to_roll_back")
    previous = await session.get_one(AdapterVersion, alias.previous_version_id)
    return await move_alias(session, adapter, name, previous, actor=actor)


async def drop_alias(session: AsyncSession, adapter: Adapter, name: str, *, actor: str) -> None:
    alias = await session.get(AdapterAlias, (adapter.id, name))
    if alias is None:
        raise NotFoundError(f"adapter {adapter.name!r} has no alias {name!r}")
    await session.delete(alias)
    audit(session, adapter.tenant_id, actor, "alias.drop", adapter.id, alias=name)
    await session.flush()


async def retire_version(
    session: AsyncSession,
    adapter: Adapter,
    version: AdapterVersion,
    *,
    actor: str,
    drop_aliases: bool = False,
) -> None:
    """Stops serving a version of a locked adapter; running requests keep it to their end.

    An alias that points to it protects it, unless `drop_aliases`.
    """
    if version.state == "RETIRED":
        return
    serving = or_(AdapterAlias.version_id == version.id, AdapterAlias.canary_version_id == version.id)
    aliases = list(await session.scalars(select(AdapterAlias).where(serving)))
    if aliases and not drop_aliases:
        names = ", ".join(sorted(alias.name for alias in aliases))
        raise ConflictError(f"version {version.version} is served as {names}", code="version_in_use")
    await session.execute(
        update(AdapterAlias)
        .where(AdapterAlias.canary_version_id == version.id)
        .values(canary_version_id=None, canary_percent=0)
    )
    await session.execute(delete(AdapterAlias).where(AdapterAlias.version_id == version.id))
    version.state = "RETIRED"
    version.retired_at = now()
    audit(session, adapter.tenant_id, actor, "version.retire", version.id, version=version.version)
    await session.flush()
    await session.refresh(version)


async def retire_model(session: AsyncSession, tenant_id: str, name: str, *, actor: str) -> AdapterVersion:
    """The version with this `ft:` name; aliases that point to it go with it."""
    query = select(AdapterVersion).where(
        AdapterVersion.tenant_id == tenant_id,
        AdapterVersion.model_name == name,
        AdapterVersion.state == "READY",
    )
    version = await session.scalar(query)
    if version is None:
        raise NotFoundError(f"the model {name!r} does not exist", code="model_not_found", param="model")
    adapter = await session.get_one(Adapter, version.adapter_id, with_for_update=True)
    await retire_version(session, adapter, version, actor=actor, drop_aliases=True)
    return version
