"""The numbers of a job's steps: one row a step, and an event for each step when it is first reported."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from shared.ids import new_id
from shared.messages import StepMetrics
from shared.models import FtEvent, FtJob, FtMetric

COLUMNS = tuple(name for name in StepMetrics.model_fields if name != "step")
SHOWN = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


async def save_metrics(session: AsyncSession, job: FtJob, metrics: Iterable[StepMetrics]) -> None:
    """A step's training numbers and a later evaluation share its row; what is reported again replaces."""
    rows = merge_steps(metrics)
    if not rows:
        return
    query = select(FtMetric.step, FtMetric.valid_loss).where(
        FtMetric.job_id == job.id, FtMetric.step.in_(list(rows))
    )
    known: dict[int, float | None] = {row.step: row.valid_loss for row in await session.execute(query)}
    await upsert(session, job, rows)
    for step, row in rows.items():
        is_first_evaluation = row.get("valid_loss") is not None and known.get(step) is None
        if step not in known or is_first_evaluation:
            session.add(metrics_event(job, step, row))


def merge_steps(metrics: Iterable[StepMetrics]) -> dict[int, dict[str, Any]]:
    """In the order of the steps; later reports of a step win."""
    rows: dict[int, dict[str, Any]] = {}
    for item in sorted(metrics, key=lambda each: each.step):
        rows.setdefault(item.step, {}).update(item.model_dump(exclude={"step"}, exclude_none=True))
    return rows


async def upsert(session: AsyncSession, job: FtJob, rows: dict[int, dict[str, Any]]) -> None:
    nothing = dict.fromkeys(COLUMNS)
    values = [
        {"job_id": job.id, "tenant_id": job.tenant_id, "step": step, **nothing, **row}
        for step, row in rows.items()
    ]
    statement = insert(FtMetric).values(values)
    merged = {name: func.coalesce(statement.excluded[name], getattr(FtMetric, name)) for name in COLUMNS}
    await session.execute(statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=merged))


def metrics_event(job: FtJob, step: int, row: dict[str, Any]) -> FtEvent:
    words = [f"Step {step}/{job.total_steps}:"]
    if "train_loss" in row:
        words.append(f"training loss={row['train_loss']:.4f}")
    if "valid_loss" in row:
        words.append(f"validation loss={row['valid_loss']:.4f}")
    data = {name: finite(row[name]) for name in SHOWN if name in row}
    return FtEvent(
        id=new_id("ftevent-"),
        tenant_id=job.tenant_id,
        job_id=job.id,
        type="metrics",
        message=" ".join(words),
        data={"step": step, "total_steps": job.total_steps, **data},
    )
