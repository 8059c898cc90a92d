"""The registry by API key: adapters, versions, files, aliases, and who changed them.

A key sees its own tenant. With the scope admin it may name another by `?tenant=<slug>`; changes need the
scope train or admin, and each leaves an audit line.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse

from services.adapter_store import repository
from services.adapter_store.deps import CallerDep, ChangerDep, ServicesDep
from services.adapter_store.schemas import (
    AdapterList,
    AdapterReply,
    AliasReply,
    AuditList,
    AuditReply,
    MoveAlias,
    RetireVersion,
    VersionList,
    VersionReply,
)
from shared import versions
from shared.errors import NotFoundError
from shared.messages import ADAPTER_FILES, adapter_prefix

router = APIRouter(prefix="/v1")
Name = Annotated[str, Path(max_length=63)]
AliasName = Annotated[str, Path(pattern=r"^[a-z][a-z0-9._-]{0,62}$")]
Number = Annotated[int, Path(ge=1, lt=2**31)]
FOREVER = {"cache-control": "private, max-age=31536000, immutable"}


@router.get("/adapters")
async def list_adapters(caller: CallerDep, services: ServicesDep) -> AdapterList:
    async with services.sessions.begin() as session:
        adapters = await repository.list_adapters(session, caller.tenant_id)
        aliases = await repository.aliases_of(session, adapters)
    return AdapterList(data=[AdapterReply.of(adapter, aliases[adapter.id]) for adapter in adapters])


@router.get("/adapters/{name}")
async def get_adapter(name: Name, caller: CallerDep, services: ServicesDep) -> AdapterReply:
    async with services.sessions.begin() as session:
        adapter = await versions.get_adapter(session, caller.tenant_id, name)
        aliases = await repository.aliases_of(session, [adapter])
    return AdapterReply.of(adapter, aliases[adapter.id])


@router.get("/adapters/{name}/versions")
async def list_versions(name: Name, caller: CallerDep, services: ServicesDep) -> VersionList:
    async with services.sessions.begin() as session:
        adapter = await versions.get_adapter(session, caller.tenant_id, name)
        found = await repository.list_versions(session, caller.tenant_id, adapter.id)
    return VersionList(data=[VersionReply.of(version, name) for version in found])


@router.get("/adapters/{name}/versions/{number}")
async def get_version(name: Name, number: Number, caller: CallerDep, services: ServicesDep) -> VersionReply:
    async with services.sessions.begin() as session:
        adapter = await versions.get_adapter(session, caller.tenant_id, name)
        version = await versions.get_version(session, adapter, number)
    return VersionReply.of(version, name)


@router.get("/adapters/{name}/versions/{number}/files/{file}")
async def download_file(
    name: Name, number: Number, file: str, caller: CallerDep, services: ServicesDep
) -> StreamingResponse:
    """One of PEFT's two files; with both in a folder, `peft` loads the adapter (but a bottleneck's, whose
    format is that of LLM-Adapters), and vLLM a LoRA."""
    if file not in ADAPTER_FILES:
        raise NotFoundError(f"a version's files are {' and '.join(ADAPTER_FILES)}")
    async with services.sessions.begin() as session:
        adapter = await versions.get_adapter(session, caller.tenant_id, name)
        version = await versions.get_version(session, adapter, number)
    key = f"{adapter_prefix(version.digest)}/{file}"
    if not await services.objects.exists(key):
        raise NotFoundError(f"{file} of version {number} has been removed")
    headers = {"etag": f'"{version.files[file]}"', "content-disposition": f'attachment; filename="{file}"'}
    stream = services.objects.stream(key)
    return StreamingResponse(stream, headers=headers | FOREVER, media_type="application/octet-stream")


@router.put("/adapters/{name}/aliases/{alias}")
async def move_alias(
    name: Name, alias: AliasName, body: MoveAlias, caller: ChangerDep, services: ServicesDep
) -> AliasReply:
    """Promotes a version: new requests by this name go to it at once."""
    async with services.sessions.begin() as session:
        adapter = await versions.get_adapter(session, caller.tenant_id, name, lock=True)
        version = await versions.get_version(session, adapter, body.version)
        canary = body.canary_version and await versions.get_version(session, adapter, body.canary_version)
        moved = await versions.move_alias(
            session,
            adapter,
            alias,
            version,
            actor=caller.actor,
            canary=canary or None,
            canary_percent=body.canary_percent,
        )
    return AliasReply.of(moved)


@router.post("/adapters/{name}/aliases/{alias}/rollback")
async def roll_back_alias(
    name: Name, alias: AliasName, caller: ChangerDep, services: ServicesDep
) -> AliasReply:
    async with services.sessions.begin() as session:
        adapter = await versions.get_adapter(session, caller.tenant_id, name, lock=True)
        return AliasReply.of(await versions.roll_back(session, adapter, alias, actor=caller.actor))


@router.delete("/adapters/{name}/aliases/{alias}", status_code=204)
async def drop_alias(name: Name, alias: AliasName, caller: ChangerDep, services: ServicesDep) -> None:
    async with services.sessions.begin() as session:
        adapter = await versions.get_adapter(session, caller.tenant_id, name, lock=True)
        await versions.drop_alias(session, adapter, alias, actor=caller.actor)


@router.post("/adapters/{name}/versions/{number}/retire")
async def retire_version(
    name: Name, number: Number, caller: ChangerDep, services: ServicesDep, body: RetireVersion | None = None
) -> VersionReply:
    """Serves it no more; refused while an alias points to it, unless `drop_aliases`."""
    drop_aliases = body is not None and body.drop_aliases
    async with services.sessions.begin() as session:
        adapter = await versions.get_adapter(session, caller.tenant_id, name, lock=True)
        version = await versions.get_version(session, adapter, number)
        await versions.retire_version(
            session, adapter, version, actor=caller.actor, drop_aliases=drop_aliases
        )
    return VersionReply.of(version, name)


@router.get("/audit")
async def list_audit(
    caller: CallerDep,
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
) -> AuditList:
    """Newest first; `before` is the id of the last line seen."""
    async with services.sessions.begin() as session:
        lines = await repository.list_audit(session, caller.tenant_id, limit=limit, before=before)
    return AuditList(data=[AuditReply.of(line) for line in lines])
