"""What must happen after a commit, written down in the transaction that decided it.

A rolled-back request sends nothing; a committed one is sent at least once, whoever dies in between.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from shared.db import now
from shared.models import BgTask, Outbox

Topic = Literal["finetune"]  # key: a job id, for the finetune queue
TaskKind = Literal["validate_dataset", "delete_object"]  # ref: a job id; an object's key

SWEPT_AFTER = timedelta(seconds=20)  # the first sending is the caller's


def send_after_commit(session: AsyncSession, topic: Topic, key: str, *, delay_s: float = 0.0) -> None:
    """The adapter store's relay sends it within about a second of becoming due."""
    session.add(Outbox(topic=topic, key=key, due_at=now() + timedelta(seconds=delay_s)))


async def require_task(session: AsyncSession, kind: TaskKind, ref: str) -> None:
    """A Celery task that is sent again until it is done. Send it once yourself after the commit."""
    task = insert(BgTask).values(kind=kind, ref=ref, due_at=now() + SWEPT_AFTER)
    await session.execute(task.on_conflict_do_nothing())
