"""Everything that lives as long as the process and is shared by its requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio

from services.api.adapters import ModelResolver
from services.api.errors import OverloadedError
from services.api.limits import ConcurrencyLimit
from services.api.metrics import Metrics
from services.api.model import BaseModel
from services.api.usage import UsageLog
from shared.celery import TaskSender
from shared.config import Settings
from shared.db import SessionFactory
from shared.messages import WorkerStatus
from shared.queue import InferenceClient
from shared.storage import ObjectStore

WORKERS_FRESH_S = 1.0
STALLED_S = 30.0  # a worker without progress for so long does not count


class Background:
    """Work that outlives its request. `drain` waits for it at the end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self, timeout_s: float) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)


@dataclass(slots=True)
class ApiState:
    settings: Settings
    sessions: SessionFactory
    store: ObjectStore
    redis: redis.asyncio.Redis
    queue: InferenceClient
    base: BaseModel
    models: ModelResolver
    usage: UsageLog
    tasks: TaskSender
    limit: ConcurrencyLimit
    metrics: Metrics
    background: Background = field(default_factory=Background)
    _workers: list[WorkerStatus] = field(default_factory=list)
    _workers_at: float = -1e9

    async def live_workers(self) -> list[WorkerStatus]:
        """Workers that make progress, as of a second ago at most. Raises QueueUnavailable."""
        if time.monotonic() - self._workers_at > WORKERS_FRESH_S:
            self._workers = await self.queue.workers()
            self._workers_at = time.monotonic()
        return [
            worker
            for worker in self._workers
            if worker.progress_age_s < STALLED_S and worker.model in ("", self.base.id)
        ]

    async def require_worker(self) -> None:
        """Refuses at once what nobody would take."""
        if not await self.live_workers():
            raise OverloadedError("No worker is available at the moment.", code="no_worker_available")
