"""Workers that crash and that sleep through their leases: every job is published once, and only once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from sqlalchemy import func, select

from shared import job_leases
from shared.db import SessionFactory
from shared.errors import ConflictError
from shared.messages import BeatRequest, JobLease
from shared.models import AdapterVersion, FtJob
from tests.records import make_claim, make_publish, make_queued_job

NUM_JOBS, NUM_WORKERS, NUM_STEPS = 16, 5, 4
LEASE_S, SLEEP_S = 1.0, 1.3
TIMEOUT_S = 60.0
SEED = 20_261


class Crashed(Exception):
    """The worker is gone without a word."""


class Worker:
    def __init__(self, factory: SessionFactory, name: str, seed: int, seen: Counter[str]) -> None:
        self._factory = factory
        self._name = name
        self._random = random.Random(seed)
        self._seen = seen

    async def run(self) -> None:
        while job_id := await self._find():
            try:
                async with self._factory.begin() as session:
                    lease = await job_leases.claim(session, job_id, make_claim(self._name), LEASE_S)
                await self._train(lease)
            except Crashed:
                self._seen["crashed"] += 1
            except ConflictError as error:
                self._seen[error.code] += 1

    async def _find(self) -> str | None:
        """A queued job, waited for; None when every job is over."""
        while True:
            async with self._factory.begin() as session:
                await job_leases.reclaim_expired(session)
                query = select(FtJob.id, FtJob.status).where(FtJob.finished_at.is_(None))
                open_jobs = [(row.id, row.status) for row in await session.execute(query)]
            if not open_jobs:
                return None
            queued = [job_id for job_id, status in open_jobs if status == "queued"]
            if queued:
                return str(self._random.choice(queued))
            await asyncio.sleep(0.05)

    async def _train(self, lease: JobLease) -> None:
        for step in range(1, NUM_STEPS + 1):
            await self._meet_fate(crash=0.06, sleep=0.06)
            beat = BeatRequest(fence=lease.fence, step=step, total_steps=NUM_STEPS)
            async with self._factory.begin() as session:
                await job_leases.beat(session, lease.job_id, beat, LEASE_S)
        await self._meet_fate(crash=0.1, sleep=0.2)  # right before the publishing
        async with self._factory.begin() as session:
            request = make_publish(lease.fence, lease.job_id.encode())
            await job_leases.publish(session, lease.job_id, request)
        self._seen["told of the version"] += 1  # also a sleeper, when it was published with the same bytes

    async def _meet_fate(self, crash: float, sleep: float) -> None:
        drawn = self._random.random()
        if drawn < crash:
            raise Crashed
        if drawn < crash + sleep:
            self._seen["slept"] += 1
            await asyncio.sleep(SLEEP_S)


async def test_crashes_and_lost_leases_publish_every_job_once(session_factory: SessionFactory) -> None:
    for _ in range(NUM_JOBS):
        await make_queued_job(session_factory, suffix="bot")
    seen: Counter[str] = Counter()
    workers = [Worker(session_factory, f"w{n}", SEED + n, seen) for n in range(NUM_WORKERS)]
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*(worker.run() for worker in workers))
    async with session_factory.begin() as session:
        endings = Counter(await session.scalars(select(func.coalesce(FtJob.error_code, FtJob.status))))
        numbers = sorted(await session.scalars(select(AdapterVersion.version)))
        sources = await session.scalar(select(func.count(AdapterVersion.source_job.distinct())))
    assert endings["succeeded"] == len(numbers) == sources
    assert endings["succeeded"] + endings["worker_crash_loop"] == NUM_JOBS
    assert endings["succeeded"] >= NUM_JOBS * 2 // 3
    assert numbers == list(range(1, len(numbers) + 1)), "no gap and no twin"
    assert seen["crashed"] >= 2 and seen["slept"] >= 3 and seen["stale_fence"] >= 1, f"seed {SEED}: {seen}"
