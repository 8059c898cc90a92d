"""What runs now."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import HTMLResponse, JSONResponse

from services.adapter_store.admin.console import Database, Render, Workers
from services.adapter_store.admin.fleet import memory_shares, state_of
from services.adapter_store.admin.queries import adapters, jobs
from shared.models import JOB_STATUSES

router = APIRouter()


@router.get("/")
async def overview(page: Render, db: Database, fleet: Workers) -> HTMLResponse:
    counts = await jobs.count_by_status(db)
    num_adapters, num_ready = await adapters.count_adapters(db)
    return page(
        "overview.html",
        fleet=fleet,
        state_of=state_of,
        memory_shares=memory_shares,
        counts={status: counts.get(status, 0) for status in JOB_STATUSES},
        num_adapters=num_adapters,
        num_ready=num_ready,
        active=await jobs.list_jobs(db, jobs.JobFilter("active"), limit=6),
        events=await jobs.list_recent_events(db),
        newest=await adapters.list_newest_versions(db),
    )


@router.get("/fleet.json")
async def fleet_now(fleet: Workers) -> JSONResponse:
    return JSONResponse(
        {
            "inference_tokens_per_s": fleet.inference_tokens_per_s,
            "finetune_tokens_per_s": fleet.finetune_tokens_per_s,
            "num_workers": len(fleet.workers),
        }
    )
