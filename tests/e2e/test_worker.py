"""The real worker process between the real queues, the real adapter store and real files."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
import torch
from peft import PeftModel
from sqlalchemy import func, select
from transformers import AutoModelForCausalLM

from services import child
from shared.config import Settings
from shared.jobs import get_job, list_events
from shared.messages import ADAPTER_FILES, AdapterRef, GenerateRequest
from shared.models import AdapterVersion
from shared.peft import Ia3Spec, PeftSpec, PrefixSpec
from shared.queue import InferenceClient
from shared.storage import ObjectStore
from tests.e2e.processes import WORKER, Processes, wait_until, with_short_timers
from tests.e2e.workload import LORA, Jobs, collect, make_request


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return with_short_timers(settings)


def reference(settings: Settings, request: GenerateRequest) -> list[int]:
    """Greedy tokens of transformers."""
    model = AutoModelForCausalLM.from_pretrained(settings.model_dir, dtype=torch.float32)
    output = model.generate(
        input_ids=torch.tensor([request.prompt]),
        max_new_tokens=request.sampling.max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(request.prompt) :].tolist()


def likeliest_in_peft(
    settings: Settings, request: GenerateRequest, output: list[int], files: Path
) -> list[int]:
    """What peft, reading the adapter's files as they are, finds likeliest after the prompt and each token."""
    base = AutoModelForCausalLM.from_pretrained(settings.model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, files).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*request.prompt, *output]])).logits[0]
    return logits[-len(output) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize(
    "peft", [LORA, Ia3Spec(), PrefixSpec(num_virtual_tokens=3)], ids=lambda spec: spec.type
)
async def test_a_job_is_trained_published_and_served_while_others_are_served(
    peft: PeftSpec,
    settings: Settings,
    processes: Processes,
    client: InferenceClient,
    jobs: Jobs,
    object_store: ObjectStore,
    tmp_path: Path,
) -> None:
    processes.start(WORKER)
    tenant_id, job_id = await jobs.make(peft=peft)
    requests = [make_request(settings, i) for i in range(12)]
    outputs = await asyncio.gather(*(collect(client, request) for request in requests))
    assert outputs[3] == reference(settings, requests[3])

    job = await jobs.until("succeeded", tenant_id, job_id)
    assert job.step == job.total_steps == 12
    async with jobs.factory.begin() as session:
        version = (
            await session.scalars(select(AdapterVersion).where(AdapterVersion.source_job == job_id))
        ).one()
    folder = tmp_path / "adapter"
    folder.mkdir()
    ref = AdapterRef(version_id=version.id, digest=version.digest)
    for name in ADAPTER_FILES:
        (folder / name).write_bytes(await object_store.get(f"{ref.prefix}/{name}"))
    adapted = make_request(settings, 50, adapter=ref)
    tokens = await collect(client, adapted)
    assert tokens == likeliest_in_peft(settings, adapted, tokens, folder)
    assert tokens != reference(settings, adapted)


async def test_the_tier_of_a_request_decides_which_targets_it_is_judged_by(
    settings: Settings, processes: Processes, client: InferenceClient
) -> None:
    """Targets that nobody can meet, or nobody miss, so that it does not matter how busy the machine is."""
    processes.start(WORKER, tpot_slo_ms=1e9, ttft_slo_ms=1e9, tpot_slo_priority_ms=1e-6)
    for number, tier in enumerate(["priority", "default", "default", "flex"]):
        await collect(client, make_request(settings, number, service_tier=tier))
    counts: dict[str, tuple[int, ...]] = {}
    for _ in range(100):
        for worker in await client.workers():
            counts = {
                tier: (level.ttft_met, level.ttft_missed, level.tpot_met, level.tpot_missed)
                for tier, level in worker.service_levels.items()
            }
        if counts.get("flex", (0,)) != (0, 0, 0, 0):
            break
        await asyncio.sleep(0.1)
    assert counts == {"priority": (1, 0, 0, 1), "default": (2, 0, 2, 0), "flex": (1, 0, 1, 0)}


async def test_a_worker_of_two_ranks_serves_and_trains_and_ends_with_any_of_them(
    settings: Settings, processes: Processes, client: InferenceClient, jobs: Jobs
) -> None:
    worker = processes.start(WORKER, tensor_parallel=2)
    job = await jobs.make()
    requests = [make_request(settings, i) for i in range(4)]
    outputs = await asyncio.gather(*(collect(client, request) for request in requests))
    assert outputs == [reference(settings, request) for request in requests]
    await jobs.until("succeeded", *job)
    child.stop(worker, SIGTERM, 30)
    assert worker.returncode == 0

    worker = processes.start(WORKER, tensor_parallel=2)
    wait_until(lambda: processes.log(WORKER).count('"worker_ready"') == 2, "the second worker")
    os.kill(rank_of(worker.pid), SIGKILL)
    assert worker.wait(30) == 1
    assert processes.log(WORKER).count('"rank_died"') == 1


async def test_a_job_that_does_not_fit_beside_another_waits_in_the_queue(
    processes: Processes, client: InferenceClient, jobs: Jobs
) -> None:
    processes.start(WORKER, finetune_bytes=300_000)
    made = [await jobs.make(epochs=10) for _ in range(2)]
    await jobs.until("running", *made[0])
    (worker,) = await client.workers()
    assert worker.memory_bytes["weights"] > 0 and worker.memory_bytes["kv_cache"] == 8 << 20
    assert sum(worker.memory_bytes.values()) < worker.memory_limit_bytes
    for job in made:
        await jobs.until("succeeded", *job)
    assert processes.log(WORKER).count('"job_handed_back"') == 1


def rank_of(worker: int) -> int:
    """The process of rank 1: beside it the worker has one that watches what they share."""
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    (rank,) = (pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return int(rank)


async def test_a_killed_worker_loses_no_token_and_its_job_resumes_from_the_last_checkpoint(
    settings: Settings, processes: Processes, client: InferenceClient, jobs: Jobs
) -> None:
    worker = processes.start(WORKER)
    tenant_id, job_id = await jobs.make(epochs=20)

    await jobs.until_checkpoint(job_id)
    requests = [make_request(settings, i) for i in range(8)]
    streams = [asyncio.create_task(collect(client, request)) for request in requests]
    await asyncio.sleep(0.3)
    worker.kill()
    worker.wait()
    async with jobs.factory.begin() as session:
        before = await get_job(session, tenant_id, job_id)
        assert before.status == "running" and 0 < before.step < before.total_steps
    processes.start(WORKER)
    outputs = await asyncio.gather(*streams)
    for request, tokens in zip(requests, outputs, strict=True):
        assert tokens == reference(settings, request)

    # the lease runs out, the sweeper sends the id again, the new worker claims under the next fence
    sweeper = asyncio.create_task(jobs.sweep())
    job = await jobs.until("succeeded", tenant_id, job_id)
    sweeper.cancel()
    assert job.fence == 2
    async with jobs.factory.begin() as session:
        query = select(func.count()).where(AdapterVersion.source_job == job_id)
        assert await session.scalar(query) == 1
        events = (await list_events(session, tenant_id, job_id, limit=1000)).items
    resumed = [event.message for event in events if "resumed after step" in event.message]
    assert len(resumed) == 1
