"""The console over a seeded registry, with jobs that go on: `python -m tests.adapter_store.console_demo [port]`."""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
import time
from pathlib import Path

import uvicorn

from migrations.run import upgrade
from services.adapter_store.main import create_app
from services.embedded import EmbeddedPostgres, EmbeddedRedis
from shared.config import Settings
from shared.db import make_engine, session_factory
from shared.messages import WorkerStatus
from shared.queue import InferenceWorkerQueue, open_redis
from tests.adapter_store.seed import BASE_MODEL, WORKER, Seeded, beat, measure, seed

PASSWORD = "operator"
STEP_S = 1.5


def report(settings: Settings, seeded: Seeded) -> None:
    """What a busy worker would say of itself."""
    wave = math.sin(time.time() / 9)
    status = WorkerStatus(
        worker_id=WORKER,
        model=BASE_MODEL,
        running=round(21 + 6 * wave),
        waiting=max(0, round(3 * wave)),
        free_blocks=round(3100 - 700 * wave),
        total_blocks=8192,
        training_jobs=tuple(lease.job_id for lease, _ in seeded.running),
        finetune_tokens_per_s=2960 - 610 * wave + 60 * math.sin(time.time()),
        inference_tokens_per_s=1730 + 640 * wave + 90 * math.sin(time.time() * 1.7),
        memory_bytes={
            "weights": 16 << 30,
            "kv_cache": 36 << 30,
            "adapters": 1 << 30,
            "trainable": 160 << 20,
            "gradients": 320 << 20,
            "optimizer": 960 << 20,
            "activations": round((9 + wave) * 2**30),
            "accumulators": 160 << 20,
            "windows": 96 << 20,
        },
        memory_limit_bytes=80 << 30,
    )
    with open_redis(settings.redis_url) as client:
        InferenceWorkerQueue(client, settings, WORKER).beat([], status)


async def drive(settings: Settings, seeded: Seeded) -> None:
    """Two steps of each running job a turn, until it is nearly done."""
    engine = make_engine(settings)
    factory = session_factory(engine)
    steps = [round(story.steps * story.until) for _, story in seeded.running]
    while True:
        await asyncio.to_thread(report, settings, seeded)
        for i, (lease, story) in enumerate(seeded.running):
            last = min(steps[i] + 2, story.steps - 1)
            await beat(factory, lease, story, tuple(measure(story, last, min(steps[i] + 1, last))))
            steps[i] = last
        await asyncio.sleep(STEP_S)


def make_folder() -> Path:
    """Where the user that PostgreSQL runs as may enter."""
    folder = Path(tempfile.mkdtemp(prefix="flexllm-console-"))
    folder.chmod(0o755)
    return folder


async def main(port: int) -> None:
    folder = make_folder()
    with (
        EmbeddedPostgres(folder / "postgres", durable=False) as postgres,
        EmbeddedRedis(folder / "redis") as redis,
    ):
        settings = Settings(
            database_url=postgres.url,
            redis_url=redis.url_of(0),
            object_store_url=f"file://{folder}/objects",
            internal_token="demo",
            key_pepper="demo",
            admin_password=PASSWORD,
            session_secret="demo",
            served_model_name=BASE_MODEL,
        )
        await asyncio.to_thread(upgrade, settings)
        engine = make_engine(settings)
        seeded = await seed(session_factory(engine), "demo")
        await engine.dispose()
        server = uvicorn.Server(uvicorn.Config(create_app(settings), port=port, log_level="warning"))
        driving = asyncio.create_task(drive(settings, seeded))
        print(
            f"http://127.0.0.1:{port}/admin/  password: {PASSWORD}  adapter: {seeded.adapter_id}", flush=True
        )
        await server.serve()
        driving.cancel()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8899))
