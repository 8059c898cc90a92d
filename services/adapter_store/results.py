"""What a finished job leaves behind besides its adapter: the file of its steps' numbers."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from shared.files import file_key
from shared.models import File, FtJob, FtMetric

HEADER = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


async def render_result_file(session: AsyncSession, job: FtJob) -> tuple[File, bytes]:
    """The row, not yet in the session, and the CSV; the same job always gets the same id."""
    query = select(
        FtMetric.step,
        FtMetric.train_loss,
        FtMetric.train_mean_token_accuracy,
        FtMetric.valid_loss,
        FtMetric.valid_mean_token_accuracy,
    ).where(FtMetric.job_id == job.id, FtMetric.tenant_id == job.tenant_id)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(cells(row) for row in await session.execute(query.order_by(FtMetric.step)))
    content = text.getvalue().encode()
    file_id = "file-" + hashlib.sha256(job.id.encode()).hexdigest()[:24]
    file = File(
        id=file_id,
        tenant_id=job.tenant_id,
        filename="step_metrics.csv",
        purpose="fine-tune-results",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        storage_key=file_key(job.tenant_id, file_id),
    )
    return file, content


def cells(row: Iterable[float | None]) -> list[str]:
    """Empty where there is no number."""
    return ["" if value is None or not math.isfinite(value) else f"{value:.6g}" for value in row]
