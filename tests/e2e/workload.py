"""Requests and jobs for a real worker, and what came of them."""

from __future__ import annotations

import asyncio
import json

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from services.adapter_store import tasks
from shared.config import Settings
from shared.db import SessionFactory
from shared.files import file_key
from shared.jobs import get_job
from shared.messages import GenerateRequest, SamplingParams, TrainSpec
from shared.model_folder import describe_model
from shared.models import BaseModelRow, Checkpoint, FtJob
from shared.peft import LoraSpec, PeftSpec
from shared.queue import InferenceClient
from shared.storage import ObjectStore
from shared.tokenizer import ChatTokenizer
from tests.records import make_file, make_job, make_tenant

LORA = LoraSpec(rank=4, alpha=8)


def make_request(settings: Settings, number: int, **fields: object) -> GenerateRequest:
    tokenizer = ChatTokenizer(settings.model_dir)
    prompt = tokenizer.encode_chat(
        [{"role": "user", "content": f"Count to {number}."}], add_generation_prompt=True
    )
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    values = {"request_id": f"req-{number}", "tenant_id": "t", "prompt": tuple(prompt), "sampling": sampling}
    return GenerateRequest(**{**values, **fields})


async def collect(client: InferenceClient, request: GenerateRequest) -> list[int]:
    """The request's tokens; every one exactly once and in order."""
    tokens: list[int] = []
    await client.enqueue(request)
    async for frame in client.stream(request):
        assert frame.from_seq == len(tokens)
        tokens += frame.tokens
        assert frame.error is None
    return tokens


class Jobs:
    """Of customers, each with one job on 24 examples."""

    def __init__(
        self, settings: Settings, factory: SessionFactory, engine: AsyncEngine, objects: ObjectStore
    ) -> None:
        self._settings, self._engine, self._objects = settings, engine, objects
        self.factory = factory

    async def make(self, epochs: int = 2, peft: PeftSpec = LORA) -> tuple[str, str]:
        """A validated job; returns (tenant id, job id)."""
        settings, content = self._settings, make_examples()
        rate = 5e-3 if peft == LORA else 0.05
        spec = TrainSpec(n_epochs=epochs, batch_size=4, learning_rate=rate, peft=peft)
        async with self.factory.begin() as session:
            tenant_id = await make_tenant(session)
            await add_base_model(session, settings)
            file_id = await make_file(session, tenant_id, content)
            job = await make_job(
                session,
                tenant_id,
                training_file=file_id,
                spec=spec,
                base_model=settings.model_id,
                suffix="counter",
            )
        await self._objects.put(file_key(tenant_id, file_id), content)
        await tasks.validate_dataset(settings, self._engine, job.id)
        return tenant_id, job.id

    async def until(self, status: str, tenant_id: str, job_id: str) -> FtJob:
        for _ in range(1200):
            async with self.factory.begin() as session:
                job = await get_job(session, tenant_id, job_id)
            if job.status == status:
                return job
            assert job.status not in ("failed", "cancelled"), (job.error_code, job.error_message)
            await asyncio.sleep(0.05)
        raise AssertionError(f"job is {job.status} at step {job.step}, not {status}")

    async def until_checkpoint(self, job_id: str) -> None:
        query = select(func.count()).select_from(Checkpoint).where(Checkpoint.job_id == job_id)
        for _ in range(1200):
            async with self.factory.begin() as session:
                if await session.scalar(query):
                    return
            await asyncio.sleep(0.02)
        raise AssertionError("no checkpoint was committed")

    async def sweep(self) -> None:
        """Again and again, as the adapter store's schedule does."""
        from services.adapter_store.celery import app

        while True:
            await tasks.sweep(self._settings, self._engine, app)
            await asyncio.sleep(0.5)


def make_examples() -> bytes:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"{i}! " * 8},
            ]
        }
        for i in range(24)
    ]
    return "\n".join(json.dumps(row) for row in rows).encode()


async def add_base_model(session: AsyncSession, settings: Settings) -> None:
    folder = describe_model(settings.model_dir)
    if await session.get(BaseModelRow, folder.base_digest) is None:
        session.add(
            BaseModelRow(
                digest=folder.base_digest,
                name=settings.model_id,
                tokenizer_digest=folder.tokenizer_digest,
            )
        )
