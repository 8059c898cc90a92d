"""Is the process alive, can it serve, and how does it do."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from redis.exceptions import RedisError
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse, Response

from services.api.deps import StateDep
from services.api.state import ApiState
from shared.queue import QueueUnavailable

router = APIRouter()


@router.api_route("/livez", methods=["GET", "HEAD"])
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.api_route("/readyz", methods=["GET", "HEAD"])
async def readyz(state: StateDep) -> JSONResponse:
    """503 with the reasons while an inference request would be refused."""
    problems = await find_problems(state)
    body = {"status": "unavailable" if problems else "ok", "problems": problems}
    return JSONResponse(body, 503 if problems else 200)


@router.api_route("/metrics", methods=["GET", "HEAD"])
async def metrics(state: StateDep) -> Response:
    """Figures of workers are missing while Redis does not answer."""
    try:
        workers = await state.live_workers()
    except QueueUnavailable:
        workers = []
    state.metrics.set_memory(workers)
    state.metrics.set_latency(workers)
    state.metrics.attainment.workers = workers
    return Response(state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def find_problems(state: ApiState) -> dict[str, str]:
    problems: dict[str, str] = {}
    try:
        async with state.sessions.begin() as session:
            await session.scalar(select(1))
    except (SQLAlchemyError, OSError) as error:
        problems["database"] = type(error).__name__
    try:
        workers = await state.queue.workers()
        live = await state.live_workers()
        if not live:
            problems["workers"] = "stalled" if workers else "none has reported"
        elif all(worker.draining for worker in live):
            problems["workers"] = "draining"
    except (QueueUnavailable, RedisError) as error:
        problems["redis"] = type(error).__name__
    return problems
