"""The workers' API over HTTP."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
import pytest

from shared import jobs
from shared.config import Settings
from shared.db import SessionFactory
from shared.files import file_key
from shared.messages import (
    ADAPTER_FILES,
    BeatReply,
    BeatRequest,
    EndJob,
    JobLease,
    Message,
    PublishReply,
    StepMetrics,
    adapter_prefix,
)
from shared.models import File, FtJob
from shared.queue import FinetuneQueue, open_redis
from shared.storage import ObjectStore
from tests.records import (
    make_adapter_files,
    make_checkpoint,
    make_claim,
    make_publish,
    make_queued_job,
    make_tenant,
    put_adapter,
)


async def post(worker: httpx.AsyncClient, job_id: str, verb: str, body: Message) -> httpx.Response:
    return await worker.post(f"/internal/jobs/{job_id}/{verb}", content=body.model_dump_json())


async def claim(worker: httpx.AsyncClient, job_id: str) -> JobLease:
    response = await post(worker, job_id, "claim", make_claim())
    assert response.status_code == 200, response.text
    return JobLease.model_validate_json(response.content)


def code_of(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


async def test_a_job_runs_from_the_queue_to_a_served_version(
    worker: httpx.AsyncClient, session_factory: SessionFactory, object_store: ObjectStore, settings: Settings
) -> None:
    job_id = await make_queued_job(session_factory, suffix="bot")
    assert await taken(settings) == job_id
    lease = await claim(worker, job_id)
    assert (lease.job_id, lease.fence, lease.lease_s) == (job_id, 1, settings.job_lease_s)
    metrics = (
        StepMetrics(step=1, train_loss=2.0, train_mean_token_accuracy=0.25),
        StepMetrics(step=1, valid_loss=1.5),
    )
    beat = BeatRequest(fence=1, step=1, total_steps=2, trained_tokens=25, metrics=metrics)
    response = await post(worker, job_id, "beat", beat)
    assert BeatReply.model_validate_json(response.content) == BeatReply()
    assert (await post(worker, job_id, "checkpoints", make_checkpoint(1, 1))).status_code == 204
    request = make_publish(1)
    await put_adapter(object_store, request)
    replies = [await post(worker, job_id, "publish", request) for _ in range(2)]
    first, second = (PublishReply.model_validate_json(reply.content) for reply in replies)
    assert first == second and first.version == 1
    async with session_factory.begin() as session:
        job = await session.get_one(FtJob, job_id)
        assert (job.status, job.fine_tuned_model) == ("succeeded", first.model)
        file = await session.get_one(File, job.result_file)
    content = await object_store.get(file_key(job.tenant_id, file.id))
    assert content == (
        b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,2,0.25,1.5,\n"
    )
    assert (file.purpose, file.sha256) == ("fine-tune-results", hashlib.sha256(content).hexdigest())


async def taken(settings: Settings) -> str:
    """The job id that the store's loop has sent, waited for."""
    import asyncio

    queue = FinetuneQueue(open_redis(settings.redis_url), settings, "w1")
    for _ in range(200):
        if entry := queue.take():
            return entry[1]
        await asyncio.sleep(0.02)
    raise AssertionError("no job id came")


async def test_what_cannot_be_claimed_is_told_apart(
    worker: httpx.AsyncClient, session_factory: SessionFactory
) -> None:
    assert code_of(await post(worker, "ftjob-none", "claim", make_claim())) == (404, "not_found")
    job_id = await make_queued_job(session_factory)
    await claim(worker, job_id)
    assert code_of(await post(worker, job_id, "claim", make_claim())) == (409, "not_claimable")


async def test_a_stale_fence_is_told_as_such(
    worker: httpx.AsyncClient, session_factory: SessionFactory
) -> None:
    job_id = await make_queued_job(session_factory)
    await claim(worker, job_id)
    bodies: dict[str, Message] = {
        "beat": BeatRequest(fence=7, step=1, total_steps=2),
        "checkpoints": make_checkpoint(7),
        "end": EndJob(fence=7, outcome="failed"),
    }
    for verb, body in bodies.items():
        assert code_of(await post(worker, job_id, verb, body)) == (409, "stale_fence")


async def test_a_worker_hands_a_job_back(worker: httpx.AsyncClient, session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    lease = await claim(worker, job_id)
    response = await post(worker, job_id, "end", EndJob(fence=lease.fence, outcome="released"))
    assert response.status_code == 204
    assert (await claim(worker, job_id)).fence == lease.fence + 1


async def test_a_cancellation_before_the_publishing_wins(
    worker: httpx.AsyncClient, session_factory: SessionFactory, object_store: ObjectStore
) -> None:
    job_id = await make_queued_job(session_factory)
    request = make_publish((await claim(worker, job_id)).fence)
    await put_adapter(object_store, request)
    async with session_factory.begin() as session:
        await jobs.request_cancel(session, await make_tenant(session), job_id)
    assert code_of(await post(worker, job_id, "publish", request)) == (409, "job_cancelled")
    async with session_factory.begin() as session:
        assert (await session.get_one(FtJob, job_id)).status == "cancelled"


@pytest.mark.parametrize("damage", ["missing", "altered", "size", "digest", "names"])
async def test_an_adapter_is_published_only_as_it_lies_in_storage(
    worker: httpx.AsyncClient, session_factory: SessionFactory, object_store: ObjectStore, damage: str
) -> None:
    job_id = await make_queued_job(session_factory)
    request = make_publish((await claim(worker, job_id)).fence)
    await put_adapter(object_store, request)
    weights = f"{adapter_prefix(request.digest)}/{ADAPTER_FILES[1]}"
    changes: dict[str, Any] = {}
    if damage == "missing":
        await object_store.delete(weights)
    elif damage == "altered":
        await object_store.put(weights, b"WEIGHTS")
    elif damage == "size":
        changes = {"size_bytes": request.size_bytes + 1}
    elif damage == "digest":
        changes = {"digest": "0" * 64}
    else:
        changes = {"files": {**request.files, "../evil": "0" * 64}}
    bad = request.model_copy(update=changes)
    assert code_of(await post(worker, job_id, "publish", bad)) == (400, "invalid_value")
    await put_adapter(object_store, request)
    assert (await post(worker, job_id, "publish", request)).status_code == 200
    assert await object_store.get(weights) == make_adapter_files()[ADAPTER_FILES[1]]


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic x", "Bearer \u00fc"]
)
async def test_only_workers_may_call(client: httpx.AsyncClient, header: str | None) -> None:
    headers = {} if header is None else {b"authorization": header.encode()}
    for verb in ("claim", "beat", "checkpoints", "publish", "end"):
        response = await client.post(f"/internal/jobs/x/{verb}", headers=headers, json={})
        assert code_of(response) == (401, "invalid_api_key")


async def test_a_malformed_body_is_refused_by_its_field(worker: httpx.AsyncClient) -> None:
    response = await worker.post("/internal/jobs/x/beat", json={"fence": "x", "step": -1})
    assert code_of(response) == (400, "invalid_value")
    assert response.json()["error"]["param"] == "fence"
    response = await worker.post("/internal/jobs/x/beat", content=b"{")
    assert code_of(response) == (400, "invalid_value")


async def test_an_unknown_route_has_the_same_shape(client: httpx.AsyncClient) -> None:
    assert code_of(await client.get("/nowhere")) == (404, "not_found")
    assert code_of(await client.get("/docs")) == (404, "not_found")
