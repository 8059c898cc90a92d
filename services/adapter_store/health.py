"""Is the process alive, can it do its work, and how much work is there."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from redis.exceptions import RedisError
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from services.adapter_store import repository
from services.adapter_store.deps import ServicesDep
from shared.db import now
from shared.models import JOB_STATUSES, AdapterVersion, BgTask, Outbox

router = APIRouter()


@router.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request, services: ServicesDep) -> JSONResponse:
    """Which of the things it depends on do not answer."""
    problems: dict[str, str] = {}
    try:
        async with services.sessions.begin() as session:
            await session.scalar(select(1))
    except (SQLAlchemyError, OSError) as error:
        problems["database"] = type(error).__name__
    try:
        await request.app.state.redis.ping()
    except (RedisError, OSError) as error:
        problems["redis"] = type(error).__name__
    body = {"status": "unavailable" if problems else "ok", "problems": problems}
    return JSONResponse(body, 503 if problems else 200)


@router.get("/metrics")
async def metrics(services: ServicesDep) -> Response:
    """Read from the database at each scrape, so that every replica says the same."""
    registry = CollectorRegistry()
    jobs = Gauge("flexllm_jobs", "Finetuning jobs by status", ["status"], registry=registry)
    unsent = Gauge("flexllm_outbox_unsent", "Messages that wait to be sent", registry=registry)
    undone = Gauge("flexllm_tasks_undone", "Background tasks that are not done", registry=registry)
    late = Gauge("flexllm_tasks_late_seconds", "Age of the oldest background task undone", registry=registry)
    served = Gauge("flexllm_adapter_versions_ready", "Adapter versions that are served", registry=registry)
    async with services.sessions.begin() as session:
        counts = await repository.count_jobs(session, None)
        unsent.set(await session.scalar(select(func.count()).select_from(Outbox)) or 0)
        undone.set(await session.scalar(select(func.count()).where(BgTask.done_at.is_(None))) or 0)
        age = select(func.extract("epoch", now() - func.min(BgTask.created_at)))
        late.set(await session.scalar(age.where(BgTask.done_at.is_(None))) or 0)
        served.set(await session.scalar(select(func.count()).where(AdapterVersion.state == "READY")) or 0)
    for status in JOB_STATUSES:
        jobs.labels(status).set(counts.get(status, 0))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
