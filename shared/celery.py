"""Celery as an accelerator of background work: a lost message costs a minute, never the work.

Every task is one id; it reads Postgres again and may run twice. What must happen stands in `bg_task`
(`shared.outbox`) and is sent again by a sweeper. Never for inference, training, publishing or leases.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from celery import Celery
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from shared.config import Settings
from shared.outbox import TaskKind

VISIBILITY_TIMEOUT_S = 900  # longer than any task may run
HARD_LIMIT_S = 870
SOFT_LIMIT_S = 840
log = structlog.get_logger()


def make_celery(settings: Settings) -> Celery:
    """The client side; `services.adapter_store.celery` adds the tasks."""
    app = Celery("flexllm", broker=settings.celery_broker_url, set_as_current=False)
    transport: dict[str, Any] = {
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "socket_timeout": 10,
        "socket_connect_timeout": 3,
        "health_check_interval": 10,
    }
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        task_time_limit=HARD_LIMIT_S,
        task_soft_time_limit=SOFT_LIMIT_S,
        task_default_queue="flexllm",
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0.1, "interval_max": 0.1},
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_concurrency=2,
        worker_max_tasks_per_child=200,
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_soft_shutdown_timeout=10.0,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_transport_options=transport,
        visibility_timeout=VISIBILITY_TIMEOUT_S,
        result_backend_transport_options={"visibility_timeout": VISIBILITY_TIMEOUT_S},
        timezone="UTC",
    )
    return app


class TaskSender:
    """Sends tasks after a commit, from an event loop."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_celery(settings)

    async def send(self, kind: TaskKind, ref: str) -> bool:
        """False where the broker is out of reach: the sweeper sends what was required."""
        try:
            await asyncio.to_thread(self._app.send_task, kind, [ref])
        except (KombuError, RedisError, OSError) as error:
            log.warning("task_not_sent", kind=kind, ref=ref, error=str(error))
            return False
        return True

    def close(self) -> None:
        self._app.close()
