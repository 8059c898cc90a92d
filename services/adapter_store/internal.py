"""The workers' API: claims, beats, checkpoints and ends of jobs, each under its fence.

Errors are `{"error": {"message", "type", "param", "code"}}`; a 409 says that the caller no longer holds the
job (`stale_fence`), that there was nothing to claim (`not_claimable`), or that the customer cancelled first
(`job_cancelled`).
"""

from __future__ import annotations

from fastapi import APIRouter, Depends

from services.adapter_store.deps import ServicesDep, require_internal_token
from services.adapter_store.service import publish_adapter
from shared import job_leases
from shared.messages import (
    BeatReply,
    BeatRequest,
    ClaimRequest,
    CommitCheckpoint,
    EndJob,
    JobLease,
    PublishReply,
    PublishRequest,
)

router = APIRouter(prefix="/internal/jobs/{job_id}", dependencies=[Depends(require_internal_token)])


@router.post("/claim")
async def claim(job_id: str, body: ClaimRequest, services: ServicesDep) -> JobLease:
    async with services.sessions.begin() as session:
        return await job_leases.claim(session, job_id, body, services.settings.job_lease_s)


@router.post("/beat")
async def beat(job_id: str, body: BeatRequest, services: ServicesDep) -> BeatReply:
    async with services.sessions.begin() as session:
        return await job_leases.beat(session, job_id, body, services.settings.job_lease_s)


@router.post("/checkpoints", status_code=204)
async def commit_checkpoint(job_id: str, body: CommitCheckpoint, services: ServicesDep) -> None:
    async with services.sessions.begin() as session:
        await job_leases.commit_checkpoint(session, job_id, body)


@router.post("/publish")
async def publish(job_id: str, body: PublishRequest, services: ServicesDep) -> PublishReply:
    return await publish_adapter(services, job_id, body)


@router.post("/end", status_code=204)
async def end(job_id: str, body: EndJob, services: ServicesDep) -> None:
    async with services.sessions.begin() as session:
        await job_leases.end(session, job_id, body)
