"""The engine at work: what one worker's iterations are made of, live."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import HTMLResponse, JSONResponse

from services.adapter_store.admin.console import Desk, Render, Workers
from services.adapter_store.admin.fleet import Fleet, memory_shares, state_of
from services.adapter_store.admin.iterations import WINDOW_S, accuracy, figures, slots
from shared.messages import WorkerStatus
from shared.queue import QueueUnavailable, read_iterations

SILENT_AFTER_S = 5.0  # a worker reports every second
router = APIRouter()
WorkerId = Annotated[str, Query(max_length=128)]


@router.get("/engine")
async def engine(page: Render, fleet: Workers, worker: WorkerId = "") -> HTMLResponse:
    chosen = choose(fleet, worker)
    return page(
        "engine.html",
        fleet=fleet,
        wanted=worker,
        worker=chosen,
        state=state_of(chosen) if chosen else "",
        is_silent=chosen is not None and is_silent(chosen),
        shares=memory_shares(chosen) if chosen else [],
    )


@router.get("/engine.json")
async def engine_now(console: Desk, fleet: Workers, worker: WorkerId = "") -> JSONResponse:
    """The last minute of one worker; of one that is gone as long as Redis keeps it."""
    chosen = choose(fleet, worker)
    worker_id = chosen.worker_id if chosen else worker
    try:
        found = await read_iterations(console.redis, worker_id, WINDOW_S)
    except QueueUnavailable:
        return JSONResponse({"worker": worker_id, "figures": {}, "slots": {}})
    total_blocks = chosen.total_blocks if chosen else 0
    return JSONResponse(
        {
            "worker": worker_id,
            "figures": figures(found) | accuracy(chosen),
            "slots": slots(found, total_blocks),
        }
    )


def choose(fleet: Fleet, wanted: str) -> WorkerStatus | None:
    """The one that was asked for, if it reports; if none was, the first that still speaks, else the first."""
    candidates = [worker for worker in fleet.workers if wanted in ("", worker.worker_id)]
    return next((worker for worker in candidates if not is_silent(worker)), next(iter(candidates), None))


def is_silent(worker: WorkerStatus) -> bool:
    return worker.progress_age_s > SILENT_AFTER_S
