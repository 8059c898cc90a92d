"""/v1/fine_tuning/jobs: create, list, retrieve, cancel, pause, resume, events, checkpoints."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.responses import JSONResponse

from services.api.deps import StateDep, TrainDep, check_body
from services.api.formats.objects import checkpoint_object, event_object, job_object, page
from services.api.limits import read_json
from services.api.schemas.fine_tuning import CreateJob
from services.api.state import ApiState
from services.api.training import new_job
from shared import jobs
from shared.db import tenant_transaction
from shared.errors import InvalidRequestError
from shared.keys import KeyOwner
from shared.models import FtJob

router = APIRouter(prefix="/v1/fine_tuning/jobs")
Change = Callable[[AsyncSession, str, str], Awaitable[FtJob]]
MAX_METADATA_FILTERS = 16


@router.post("")
async def create(
    owner: TrainDep,
    state: StateDep,
    raw: Annotated[Any, Depends(read_json)],
    idempotency_key: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """A request that was sent before gets the job that it made then."""
    new = await new_job(state, owner, check_body(CreateJob, raw), raw, idempotency_key)
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        created = await jobs.create_job(session, owner.tenant_id, new)
    if created.is_new:
        state.background.spawn(state.tasks.send("validate_dataset", created.job.id))
    headers = {} if created.is_new else {"idempotent-replayed": "true"}
    return JSONResponse(job_object(created.job, owner.org), headers=headers)


@router.get("")
async def list_all(
    request: Request,
    owner: TrainDep,
    state: StateDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    metadata, without_metadata = metadata_filter(request)
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        found = await jobs.list_jobs(
            session,
            owner.tenant_id,
            metadata=metadata,
            without_metadata=without_metadata,
            after=after,
            limit=limit,
        )
    return page([job_object(job, owner.org) for job in found.items], found.has_more)


def metadata_filter(request: Request) -> tuple[dict[str, str], bool]:
    """`metadata[key]=value`, any number of them; or `metadata=null` for jobs that have none."""
    filters = {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.multi_items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if len(filters) > MAX_METADATA_FILTERS:
        raise InvalidRequestError(f"at most {MAX_METADATA_FILTERS} metadata filters", param="metadata")
    return filters, request.query_params.get("metadata") == "null"


@router.get("/{job_id}")
async def retrieve(job_id: str, owner: TrainDep, state: StateDep) -> dict[str, Any]:
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        return job_object(await jobs.get_job(session, owner.tenant_id, job_id), owner.org)


@router.post("/{job_id}/cancel")
async def cancel(job_id: str, owner: TrainDep, state: StateDep) -> dict[str, Any]:
    return await change(state, owner, job_id, jobs.request_cancel)


@router.post("/{job_id}/pause")
async def pause(job_id: str, owner: TrainDep, state: StateDep) -> dict[str, Any]:
    return await change(state, owner, job_id, jobs.request_pause)


@router.post("/{job_id}/resume")
async def resume(job_id: str, owner: TrainDep, state: StateDep) -> dict[str, Any]:
    return await change(state, owner, job_id, jobs.request_resume)


async def change(state: ApiState, owner: KeyOwner, job_id: str, request: Change) -> dict[str, Any]:
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        return job_object(await request(session, owner.tenant_id, job_id), owner.org)


@router.get("/{job_id}/events")
async def events(
    job_id: str,
    owner: TrainDep,
    state: StateDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        found = await jobs.list_events(session, owner.tenant_id, job_id, after=after, limit=limit)
    return page([event_object(event) for event in found.items], found.has_more)


@router.get("/{job_id}/checkpoints")
async def checkpoints(
    job_id: str,
    owner: TrainDep,
    state: StateDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> dict[str, Any]:
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        job = await jobs.get_job(session, owner.tenant_id, job_id)
        found = await jobs.list_checkpoints(session, owner.tenant_id, job_id, after=after, limit=limit)
    items = [checkpoint_object(checkpoint, job) for checkpoint in found.items]
    return page(items, found.has_more, with_ends=True)
