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
from shared.messages import TierAttainment, WorkerStatus
from shared.queue import InferenceWorkerQueue, IterationBatch, IterationSender, open_redis
from tests.adapter_store.seed import BASE_MODEL, WORKER, Seeded, beat, measure, seed

PASSWORD = "operator"
STEP_S = 1.5
ITERATIONS = 30  # of one step


def report(settings: Settings, seeded: Seeded) -> None:
    """What a busy worker would say of itself."""
    wave = math.sin(time.time() / 9)
    status = WorkerStatus(
        worker_id=WORKER,
        model=BASE_MODEL,
        engine_steps=round(time.time() * ITERATIONS / STEP_S) % 1_000_000,
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
        latency_error_p50=0.06,
        latency_error_p95=0.21,
        service_levels={
            tier: TierAttainment(
                ttft_slo_ms=ttft_ms,
                tpot_slo_ms=tpot_ms,
                ttft_met=round(990 * ttft_ms**0.1),
                ttft_missed=9,
                ttft_ms_sum=300_000 * ttft_ms**0.1,
                tpot_met=round(980 * ttft_ms**0.1),
                tpot_missed=19,
                tpot_ms_sum=30_000 * ttft_ms**0.1,
            )
            for tier, tpot_ms, ttft_ms in (
                ("priority", 50, 667),
                ("default", 150, 2000),
                ("flex", 1200, 16000),
            )
        },
    )
    with open_redis(settings.redis_url) as client:
        InferenceWorkerQueue(client, settings, WORKER).beat([], status)
        IterationSender(client, WORKER).send(iterations(status))


def iterations(status: WorkerStatus) -> IterationBatch:
    """What fits the report: windows forth, then back, beside the decodes."""
    columns: dict[str, list[float]] = {}
    for i in range(ITERATIONS):
        is_back = i % 10 >= 4
        prefill = 120 if i % 17 == 3 else 0
        limit_ms = 80 - 2 * status.running
        row = {
            "age_ms": 1000 * STEP_S * (1 - (i + 1) / ITERATIONS),
            "decode_tokens": status.running,
            "prefill_tokens": prefill,
            "forward_tokens": 0 if is_back else 230 - 2 * prefill,
            "backward_tokens": 160.0 if is_back else 0.0,
            "limit_ms": limit_ms,
            "predicted_ms": 0.9 * limit_ms,
            "forward_ms": (0.3 if is_back else 0.8 + 0.05 * math.sin(i)) * limit_ms,
            "steps_ms": 0.55 * limit_ms if is_back else 0.0,
            "finetuning_ms": (0.55 if is_back else 0.5) * limit_ms,
            "running": status.running,
            "waiting": status.waiting,
            "free_blocks": status.free_blocks,
            "jobs": len(status.training_jobs),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return IterationBatch.model_validate(columns)


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
