"""A registry as it looks after some weeks of use, made through the functions that the services use.

For a look at the console: `python -m tests.adapter_store.console_demo`.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from shared import job_leases
from shared.db import SessionFactory
from shared.ids import new_id
from shared.job_state import add_event, enqueue, lock_job
from shared.jobs import NewJob, create_job, request_cancel
from shared.keys import create_key, create_tenant, revoke_key
from shared.messages import (
    BeatRequest,
    ClaimRequest,
    DatasetRef,
    EndJob,
    JobLease,
    PublishReply,
    StepMetrics,
    TrainSpec,
)
from shared.models import AdapterVersion, BaseModelRow, FtJob
from shared.peft import BottleneckSpec, LoraSpec, PeftSpec, PrefixSpec
from shared.usage import InferenceUsage, record_inference
from shared.versions import get_adapter, get_version, move_alias, retire_version
from tests.records import make_checkpoint, make_file, make_publish

BASE_MODEL = "SmolLM2-135M-Instruct"
BASE_DIGEST = hashlib.sha256(BASE_MODEL.encode()).hexdigest()
WORKER = "gpu-worker-7c1e"
LEASE_S = 300.0
DATED = {  # table -> (column that names the row, columns to move back)
    "ft_job": ("id", ("created_at", "queued_at", "started_at", "finished_at", "updated_at")),
    "adapter_version": ("source_job", ("created_at",)),
}


SPREAD = """
UPDATE {table} SET created_at = clock_timestamp() - :back + :took * part.part FROM (
    SELECT id, (row_number() OVER (ORDER BY seq) - 1.0) / count(*) OVER () AS part
    FROM {table} WHERE job_id = :job
) AS part WHERE part.id = {table}.id
"""


@dataclass(frozen=True, slots=True)
class Story:
    """How one training goes. `until` is the part of it that has been run."""

    name: str
    org: str
    steps: int = 400
    start: float = 2.4  # losses at the first step and far on
    floor: float = 0.9
    pace: float = 4.0
    spec: TrainSpec = field(default_factory=TrainSpec)
    examples: int = 2140
    until: float = 1.0
    hours_ago: float = 1.0
    minutes: float = 42.0
    promote: bool = False


def measure(story: Story, up_to: int, from_step: int = 1) -> Iterator[StepMetrics]:
    """The numbers that a worker would report, the same at every call."""
    source = random.Random(f"{story.name}{story.hours_ago}")
    noise = [source.gauss(0, 1) for _ in range(story.steps + 1)]
    warm_up = max(1, story.steps // 30)
    for step in range(from_step, up_to + 1):
        part = step / story.steps
        loss = story.floor + (story.start - story.floor) * math.exp(-story.pace * part)
        wobble = noise[step] * 0.055 * loss
        rate = min(step / warm_up, 0.5 * (1 + math.cos(math.pi * part))) * story.spec.learning_rate
        is_evaluated = step % max(1, story.steps // 12) == 0 or step == story.steps
        yield StepMetrics(
            step=step,
            train_loss=loss + wobble,
            train_mean_token_accuracy=max(0.0, min(0.99, 0.98 - 0.21 * loss - wobble * 0.18)),
            valid_loss=valid_loss(story, part) if is_evaluated else None,
            valid_mean_token_accuracy=0.965 - 0.21 * valid_loss(story, part) if is_evaluated else None,
            learning_rate=rate,
            grad_norm=0.32 + 1.3 * math.exp(-9 * part) + abs(noise[step]) * 0.09,
            num_tokens=story.spec.batch_size * 310,
            tokens_per_s=1480 + 130 * noise[step] - 420 * (1 if 0.42 < part < 0.55 else 0),
        )


def valid_loss(story: Story, part: float) -> float:
    """Follows the training loss, and turns up a little where the training is long."""
    return story.floor + 0.09 + (story.start - story.floor) * math.exp(-story.pace * part) + 0.11 * part**3


async def start_job(factory: SessionFactory, tenant_id: str, story: Story) -> str:
    """Created, its files found good, queued."""
    async with factory.begin() as session:
        files = [
            await make_file(session, tenant_id, name.encode(), filename=f"{story.name}.{name}.jsonl")
            for name in ("train", "valid")
        ]
        new = NewJob(
            base_model=BASE_MODEL,
            training_file=files[0],
            validation_file=files[1],
            spec=story.spec,
            request_hash=new_id("file-"),
            suffix=story.name,
            promote=story.promote,
        )
        job = (await create_job(session, tenant_id, new)).job
    async with factory.begin() as session:
        job = await lock_job(session, job.id)
        accept_files(job, story)
        add_event(session, job, f"Validated training_file: {story.examples:,} examples.")
        enqueue(session, job)
        add_event(session, job, "Files validated, moving job to queued state")
    return job.id


def accept_files(job: FtJob, story: Story) -> None:
    job.base_digest = BASE_DIGEST
    job.report = {
        "training_file": report_of(story.examples),
        "validation_file": report_of(story.examples // 12),
    }
    data = DatasetRef(
        key="datasets/x",
        sha256=hashlib.sha256(f"{story.name}{story.examples}".encode()).hexdigest(),
        num_examples=story.examples,
        num_tokens=story.examples * 312,
        num_trained_tokens=story.examples * 131,
    )
    job.training_data = job.validation_data = data.model_dump()


def report_of(examples: int) -> dict[str, object]:
    return {
        "lines": examples,
        "examples": examples,
        "tokens": examples * 312,
        "trained_tokens": examples * 131,
        "longest_example": 987,
        "too_long": 0,
        "error_count": 0,
        "errors": [],
    }


async def claim_job(factory: SessionFactory, job_id: str) -> JobLease:
    async with factory.begin() as session:
        request = ClaimRequest(worker_id=WORKER, base_model=BASE_MODEL, base_digest=BASE_DIGEST)
        return await job_leases.claim(session, job_id, request, LEASE_S)


async def train(factory: SessionFactory, lease: JobLease, story: Story, from_step: int = 1) -> None:
    """Beats and checkpoints up to `story.until`."""
    last = round(story.steps * story.until)
    metrics = tuple(measure(story, last, from_step))
    for part in range(0, len(metrics), 100):
        await beat(factory, lease, story, metrics[part : part + 100])
    for step in range(story.steps // 4, last + 1, max(1, story.steps // 4)):
        async with factory.begin() as session:
            manifest = hashlib.sha256(f"{lease.job_id}{step}".encode()).hexdigest()
            metrics_then = next(measure(story, step, step))
            commit = make_checkpoint(lease.fence, step, metrics=metrics_then, manifest_sha256=manifest)
            await job_leases.commit_checkpoint(session, lease.job_id, commit)


async def beat(
    factory: SessionFactory, lease: JobLease, story: Story, metrics: tuple[StepMetrics, ...]
) -> None:
    step = metrics[-1].step
    tokens_per_step = story.spec.batch_size * 310
    request = BeatRequest(
        fence=lease.fence,
        step=step,
        total_steps=story.steps,
        trained_tokens=step * tokens_per_step,
        eta_s=(story.steps - step) * tokens_per_step / 1480,
        metrics=metrics,
    )
    async with factory.begin() as session:
        await job_leases.beat(session, lease.job_id, request, LEASE_S)


async def publish(factory: SessionFactory, lease: JobLease, story: Story) -> PublishReply:
    final = next(measure(story, story.steps, story.steps))
    weights = f"{story.name}{story.hours_ago}".encode()
    request = make_publish(
        lease.fence,
        weights,
        base_digest=BASE_DIGEST,
        size_bytes=size_of(story.spec.peft),
        trained_tokens=story.steps * story.spec.batch_size * 310,
        metrics={
            "train_loss": final.train_loss,
            "train_mean_token_accuracy": final.train_mean_token_accuracy,
            "valid_loss": final.valid_loss,
            "valid_mean_token_accuracy": final.valid_mean_token_accuracy,
            "base_valid_loss": story.start + 0.11,
        },
    )
    async with factory.begin() as session:
        return await job_leases.publish(session, lease.job_id, request)


def size_of(peft: PeftSpec) -> int:
    """Bytes of the weights on this base model."""
    match peft:
        case LoraSpec():
            return peft.rank * 305_172
        case BottleneckSpec():
            return peft.size * 276_480
        case _:
            return max(1, peft.num_virtual_tokens) * 46_080


async def back_date(factory: SessionFactory, job_id: str, story: Story) -> None:
    """As if the job had been made then: its rows, and an end `minutes` after its start."""
    back = timedelta(hours=story.hours_ago)
    async with factory.begin() as session:
        # the guard of finished jobs is for those who do not pretend
        await session.execute(text("ALTER TABLE ft_job DISABLE TRIGGER ft_job_guard"))
        for table, (key, columns) in DATED.items():
            moved = ", ".join(f"{name} = {name} - :back" for name in columns)
            await session.execute(
                text(f"UPDATE {table} SET {moved} WHERE {key} = :job"), {"back": back, "job": job_id}
            )
        took = min(back, timedelta(minutes=story.minutes))
        about = {"back": back, "took": took, "job": job_id}
        for table in ("ft_event", "checkpoint"):
            await session.execute(text(SPREAD.format(table=table)), about)
        await session.execute(
            text("UPDATE ft_job SET finished_at = finished_at + :took WHERE id = :job"),
            {"took": took, "job": job_id},
        )
        await session.execute(
            text("UPDATE audit_log SET created_at = created_at - :back WHERE actor = :actor"),
            {"back": back, "actor": f"job:{job_id}"},
        )
        await session.execute(text("ALTER TABLE ft_job ENABLE TRIGGER ft_job_guard"))


async def finish_job(factory: SessionFactory, tenant_id: str, story: Story) -> PublishReply:
    """The whole life of a job that succeeds."""
    job_id = await start_job(factory, tenant_id, story)
    lease = await claim_job(factory, job_id)
    await train(factory, lease, story)
    reply = await publish(factory, lease, story)
    await back_date(factory, job_id, story)
    return reply


async def run_job(
    factory: SessionFactory, tenant_id: str, story: Story, ending: EndJob | None = None
) -> JobLease:
    """A job that is in training now, or that its worker gave up."""
    job_id = await start_job(factory, tenant_id, story)
    lease = await claim_job(factory, job_id)
    await train(factory, lease, story)
    if ending is not None:
        async with factory.begin() as session:
            await job_leases.end(session, job_id, ending)
    await back_date(factory, job_id, story)
    return lease


async def serve_requests(session: AsyncSession, version: AdapterVersion, count: int) -> None:
    usages = [
        InferenceUsage(
            request_id=f"req-{version.id}-{i}",
            tenant_id=version.tenant_id,
            model=version.model_name,
            version_id=version.id,
            prompt_tokens=180 + i % 90,
            completion_tokens=60 + i % 55,
        )
        for i in range(count)
    ]
    await record_inference(session, usages)


@dataclass(slots=True)
class Seeded:
    """Jobs that are in training, to be driven on."""

    running: list[tuple[JobLease, Story]]
    adapter_id: str


async def seed(factory: SessionFactory, pepper: str, scale: float = 1.0) -> Seeded:
    """`scale` shortens every training."""
    tenants = await make_tenants(factory, pepper)

    def story(name: str, org: str, steps: int, **fields: object) -> Story:
        return Story(name, org, max(12, round(steps * scale)), **fields)  # type: ignore[arg-type]

    small, wide = TrainSpec(peft=LoraSpec(rank=8, alpha=16)), TrainSpec(learning_rate=1e-4)
    deep = TrainSpec(peft=LoraSpec(rank=32, alpha=64), n_epochs=4, batch_size=16)
    bottleneck = TrainSpec(peft=BottleneckSpec(size=48), learning_rate=3e-4)
    prefix = TrainSpec(peft=PrefixSpec(num_virtual_tokens=30), learning_rate=1e-2)
    done = [
        story("support-bot", "acme", 300, hours_ago=412, spec=small, floor=1.16, examples=1210),
        story("contract-clauses", "northwind", 240, hours_ago=261, spec=wide, floor=1.02),
        story("support-bot", "acme", 420, hours_ago=172, floor=0.98, examples=1890, promote=True),
        story("triage-notes", "orchid", 360, hours_ago=95, spec=bottleneck, floor=0.84, examples=4096),
        story("sql-writer", "northwind", 500, hours_ago=50, floor=0.62, examples=7420),
        story("support-bot", "acme", 480, hours_ago=26, floor=0.86, examples=2140, promote=True),
        story("support-bot", "acme", 640, hours_ago=2.2, spec=deep, floor=0.79, examples=3012, minutes=58),
    ]
    for each in done:
        await finish_job(factory, tenants[each.org], each)
    await add_unfinished(factory, tenants, story)
    running = [
        story("returns-agent", "acme", 900, until=0.64, hours_ago=0.55, spec=deep, floor=0.88, examples=5210),
        story(
            "sql-writer", "northwind", 700, until=0.27, hours_ago=0.2, spec=prefix, floor=0.6, examples=9034
        ),
    ]
    leases = [(await run_job(factory, tenants[each.org], each), each) for each in running]
    waiting = story("discharge-letters", "orchid", 400, hours_ago=0.05)
    await start_job(factory, tenants[waiting.org], waiting)
    adapter_id = await serve_adapters(factory, tenants)
    return Seeded(leases, adapter_id)


async def make_tenants(factory: SessionFactory, pepper: str) -> dict[str, str]:
    names = {"acme": "Acme Robotics", "northwind": "Northwind Legal", "orchid": "Orchid Health"}
    found = {}
    async with factory.begin() as session:
        session.add(
            BaseModelRow(digest=BASE_DIGEST, name=BASE_MODEL, tokenizer_digest="7" * 64, source=BASE_MODEL)
        )
        for slug, name in names.items():
            tenant = await create_tenant(session, name, slug, weight=2.0 if slug == "acme" else 1.0)
            found[slug] = tenant.id
            await create_key(session, tenant.id, SecretStr(pepper), name="production")
        reader, _ = await create_key(
            session, found["acme"], SecretStr(pepper), name="evaluation", scopes=("infer",)
        )
        late = timedelta(days=90)
        await create_key(session, found["acme"], SecretStr(pepper), name="nightly-jobs", expires_after=late)
        await revoke_key(session, found["acme"], reader.id, actor="admin")
    return found


async def add_unfinished(factory: SessionFactory, tenants: dict[str, str], story: object) -> None:
    """Jobs that failed, were cancelled, or wait for a word."""
    assert callable(story)
    failing = story("intent-router", "northwind", 300, until=0.3, hours_ago=70, minutes=9, floor=1.4)
    words = "The loss was not finite at step 91 and at both earlier checkpoints; lower the learning rate."
    diverged = EndJob(fence=1, outcome="failed", code="training_diverged", message=words)
    await run_job(factory, tenants["northwind"], failing, diverged)
    dropped = story("icd-codes", "orchid", 300, hours_ago=30, minutes=2)
    job_id = await start_job(factory, tenants["orchid"], dropped)
    async with factory.begin() as session:
        await request_cancel(session, tenants["orchid"], job_id)
    await back_date(factory, job_id, dropped)
    resting = story("rx-summaries", "orchid", 520, until=0.45, hours_ago=9)
    await run_job(factory, tenants["orchid"], resting, EndJob(fence=1, outcome="paused"))


async def serve_adapters(factory: SessionFactory, tenants: dict[str, str]) -> str:
    """Requests for each version; `support-bot` gets a canary, a second alias and a retired version."""
    counts = {"contract-clauses": [190], "triage-notes": [840], "sql-writer": [460]}
    async with factory.begin() as session:
        for name, org in (("contract-clauses", "northwind"), ("triage-notes", "orchid")):
            adapter = await get_adapter(session, tenants[org], name)
            await serve_requests(session, await get_version(session, adapter, 1), counts[name][0])
        adapter = await get_adapter(session, tenants["northwind"], "sql-writer")
        await serve_requests(session, await get_version(session, adapter, 1), counts["sql-writer"][0])
        adapter = await get_adapter(session, tenants["acme"], "support-bot", lock=True)
        versions = {number: await get_version(session, adapter, number) for number in (1, 2, 3, 4)}
        for number, count in ((2, 120), (3, 1730), (4, 196)):
            await serve_requests(session, versions[number], count)
        await move_alias(session, adapter, "staging", versions[4], actor="admin")
        await move_alias(
            session, adapter, "live", versions[3], actor="admin", canary=versions[4], canary_percent=10
        )
        await retire_version(session, adapter, versions[1], actor="admin", drop_aliases=True)
        for table in ("adapter", "tenant", "api_key"):
            await session.execute(text(f"UPDATE {table} SET created_at = created_at - interval '18 days'"))
        return adapter.id
