"""What is billed, recorded once by its id however often it is sent."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from shared.messages import Message
from shared.models import UsageRecord


class InferenceUsage(Message):
    """One finished request."""

    request_id: str
    tenant_id: str
    key_id: str | None = None
    model: str
    version_id: str | None = None
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    cached_tokens: int = Field(default=0, ge=0)


async def record_inference(session: AsyncSession, usages: Sequence[InferenceUsage]) -> None:
    if not usages:
        return
    rows = [
        {"id": usage.request_id, "kind": "inference", **usage.model_dump(exclude={"request_id"})}
        for usage in usages
    ]
    await session.execute(insert(UsageRecord).values(rows).on_conflict_do_nothing())
