"""Rows and requests with defaults: a test of jobs or adapters names only what it is about."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from shared import job_leases
from shared.db import SessionFactory
from shared.files import create_file
from shared.ids import new_id
from shared.job_state import enqueue, lock_job
from shared.jobs import NewJob, create_job
from shared.keys import create_tenant, find_tenant
from shared.messages import (
    ADAPTER_FILES,
    ClaimRequest,
    CommitCheckpoint,
    DatasetRef,
    JobLease,
    PublishReply,
    PublishRequest,
    TrainSpec,
    adapter_prefix,
    content_digest,
)
from shared.models import BaseModelRow, FtJob
from shared.storage import ObjectStore

BASE_MODEL = "tiny"
BASE_DIGEST = hashlib.sha256(b"base").hexdigest()
TOKENIZER_DIGEST = hashlib.sha256(b"tokenizer").hexdigest()
LEASE_S = 60.0
DATASET = DatasetRef(
    key="datasets/x", sha256="d" * 64, num_examples=10, num_tokens=100, num_trained_tokens=50
)


async def make_tenant(session: AsyncSession, slug: str = "acme") -> str:
    """Its id; the one that is there, if one is."""
    tenant = await find_tenant(session, slug) or await create_tenant(session, slug.title(), slug)
    return tenant.id


async def make_file(session: AsyncSession, tenant_id: str, content: bytes = b"x", **fields: Any) -> str:
    file_id = new_id("file-")
    values = {"filename": "train.jsonl", "purpose": "fine-tune", **fields}
    sha256 = hashlib.sha256(content).hexdigest()
    await create_file(session, tenant_id, file_id=file_id, size_bytes=len(content), sha256=sha256, **values)
    return file_id


async def make_job(session: AsyncSession, tenant_id: str, **fields: Any) -> FtJob:
    """A new job in `validating_files`."""
    values = {
        "base_model": BASE_MODEL,
        "spec": TrainSpec(),
        "request_hash": new_id("file-"),
        "training_file": fields.pop("training_file", None) or await make_file(session, tenant_id),
        **fields,
    }
    return (await create_job(session, tenant_id, NewJob(**values))).job


async def make_base_model(session: AsyncSession) -> None:
    if await session.get(BaseModelRow, BASE_DIGEST) is None:
        session.add(BaseModelRow(digest=BASE_DIGEST, name=BASE_MODEL, tokenizer_digest=TOKENIZER_DIGEST))
        await session.flush()


async def make_queued_job(factory: SessionFactory, slug: str = "acme", **fields: Any) -> str:
    """The id of a job whose files were found good."""
    async with factory.begin() as session:
        await make_base_model(session)
        tenant_id = await make_tenant(session, slug)
        job = await lock_job(session, (await make_job(session, tenant_id, **fields)).id)
        job.base_digest = BASE_DIGEST
        job.training_data = DATASET.model_dump()
        enqueue(session, job)
    return job.id


def make_claim(worker_id: str = "w1", **fields: Any) -> ClaimRequest:
    return ClaimRequest(
        **{"worker_id": worker_id, "base_model": BASE_MODEL, "base_digest": BASE_DIGEST, **fields}
    )


async def claim_job(
    factory: SessionFactory, job_id: str, worker_id: str = "w1", lease_s: float = LEASE_S
) -> JobLease:
    async with factory.begin() as session:
        return await job_leases.claim(session, job_id, make_claim(worker_id), lease_s)


def make_checkpoint(fence: int, step: int = 5, **fields: Any) -> CommitCheckpoint:
    values = {
        "fence": fence,
        "checkpoint_id": new_id("ftckpt_"),
        "step": step,
        "manifest_key": f"checkpoints/job/{fence}-{step}/manifest.json",
        "manifest_sha256": "c" * 64,
        **fields,
    }
    return CommitCheckpoint(**values)


def make_adapter_files(weights: bytes = b"weights") -> dict[str, bytes]:
    config = json.dumps({"peft_type": "LORA", "r": 8}).encode()
    return dict(zip(ADAPTER_FILES, (config, weights), strict=True))


def make_publish(fence: int, weights: bytes = b"weights", **fields: Any) -> PublishRequest:
    contents = make_adapter_files(weights)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    values = {
        "fence": fence,
        "digest": content_digest(files),
        "files": files,
        "size_bytes": sum(map(len, contents.values())),
        "base_digest": BASE_DIGEST,
        "trained_tokens": 50,
        "metrics": {"train_loss": 0.5},
        **fields,
    }
    return PublishRequest(**values)


async def put_adapter(store: ObjectStore, request: PublishRequest, weights: bytes = b"weights") -> None:
    for name, content in make_adapter_files(weights).items():
        await store.put(f"{adapter_prefix(request.digest)}/{name}", content)


async def publish_job(factory: SessionFactory, job_id: str, weights: bytes = b"weights") -> PublishReply:
    """Claims and publishes a queued job."""
    lease = await claim_job(factory, job_id)
    async with factory.begin() as session:
        return await job_leases.publish(session, job_id, make_publish(lease.fence, weights))
