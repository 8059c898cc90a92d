"""The internal API's operations that touch more than the database.

Slow work, such as hashing an adapter's files, happens before the transaction that depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from services.adapter_store.results import render_result_file
from shared import job_leases
from shared.config import Settings
from shared.db import SessionFactory
from shared.errors import InvalidRequestError, JobCancelledError, NotFoundError
from shared.messages import (
    ADAPTER_FILES,
    EndJob,
    PublishReply,
    PublishRequest,
    adapter_prefix,
    content_digest,
)
from shared.models import File, FtJob
from shared.storage import ObjectMissingError, ObjectStore

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes work with."""

    settings: Settings
    sessions: SessionFactory
    objects: ObjectStore


async def publish_adapter(services: Services, job_id: str, request: PublishRequest) -> PublishReply:
    """Checks the objects, then makes them a version. Repeating it is safe."""
    file = await prepare_publish(services, job_id, request)
    try:
        async with services.sessions.begin() as session:
            reply = await job_leases.publish(session, job_id, request, file)
    except JobCancelledError:
        async with services.sessions.begin() as session:
            await job_leases.end(session, job_id, EndJob(fence=request.fence, outcome="cancelled"))
        raise
    log.info("adapter_published", job=job_id, version=reply.version_id, digest=request.digest)
    return reply


async def prepare_publish(services: Services, job_id: str, request: PublishRequest) -> File | None:
    """The job's result file, stored, for a job that is not published yet."""
    async with services.sessions.begin() as session:
        job = await session.get(FtJob, job_id)
        if job is None:
            raise NotFoundError(f"no fine-tuning job {job_id!r}")
        if job.status != "running":
            return None
        file, content = await render_result_file(session, job)
    await check_objects(services.objects, request)
    await services.objects.put(file.storage_key, content)
    return file


async def check_objects(store: ObjectStore, request: PublishRequest) -> None:
    """Every version's files exist, whole and with the hashes it is named by."""
    if set(request.files) != set(ADAPTER_FILES) or content_digest(request.files) != request.digest:
        raise InvalidRequestError("the digest is not that of the adapter's two files", param="digest")
    total = 0
    for name, sha256 in request.files.items():
        key = f"{adapter_prefix(request.digest)}/{name}"
        try:
            found = await store.sha256(key)
            total += await store.size(key)
        except ObjectMissingError:
            raise InvalidRequestError(f"{name} is not in object storage", param="files") from None
        if found != sha256:
            raise InvalidRequestError(f"{name} in object storage has sha256 {found}", param="files")
    if total != request.size_bytes:
        raise InvalidRequestError(f"the files have {total} bytes in all", param="size_bytes")
