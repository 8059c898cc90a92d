"""How the GPU workers are, as they report it to Redis."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Sequence

from shared.config import Settings
from shared.messages import WorkerStatus
from shared.queue import InferenceClient, QueueUnavailable, open_async_redis

STALLED_S = 30.0


def find_workers(settings: Settings) -> list[WorkerStatus]:
    """Workers that reported lately. Raises QueueUnavailable."""

    async def ask() -> list[WorkerStatus]:
        async with open_async_redis(settings.redis_url) as client:
            return await InferenceClient(client, settings, "status").workers()

    return asyncio.run(ask())


def worker_problem(
    settings: Settings, host: str | None = None, started_within_s: float = math.inf
) -> str | None:
    """None when a worker (on `host`, where given) that is up for no longer than so makes progress."""
    try:
        workers = find_workers(settings)
    except QueueUnavailable as error:
        return f"Redis does not answer: {error}"
    return progress_problem(
        [
            worker
            for worker in workers
            if (host is None or is_on(worker, host)) and worker.uptime_s <= started_within_s
        ]
    )


def progress_problem(workers: Sequence[WorkerStatus]) -> str | None:
    if not workers:
        return "no worker has reported yet"
    if all(worker.progress_age_s > STALLED_S for worker in workers):
        return f"no step finished for {min(worker.progress_age_s for worker in workers):.0f} s"
    return None


def is_on(worker: WorkerStatus, host: str) -> bool:
    return worker.worker_id.rsplit("-", 1)[0] == host


def this_host() -> str:
    return socket.gethostname()


def worker_line(worker: WorkerStatus) -> str:
    state = "draining" if worker.draining else "stalled" if worker.progress_age_s > STALLED_S else "working"
    used = worker.total_blocks - worker.free_blocks
    return (
        f"{worker.worker_id}  {worker.model}  {state}: {worker.running} running, {worker.waiting} waiting, "
        f"{used}/{worker.total_blocks} cache blocks, {worker.inference_tokens_per_s:.0f} tokens/s; "
        f"{len(worker.training_jobs)} jobs, {worker.finetune_tokens_per_s:.0f} tokens/s"
    )
