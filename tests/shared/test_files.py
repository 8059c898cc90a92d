"""File rows and usage records."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from shared.db import SessionFactory
from shared.errors import NotFoundError
from shared.files import delete_file, get_file, list_files
from shared.ids import adapter_name_of
from shared.models import BgTask, UsageRecord
from shared.usage import InferenceUsage, record_inference
from tests.records import make_file, make_tenant


async def test_files_are_listed_by_purpose_in_either_order(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        tenant, other = await make_tenant(session), await make_tenant(session, "other")
        first, second = await make_file(session, tenant), await make_file(session, tenant)
        batch = await make_file(session, tenant, purpose="batch")
        foreign = await make_file(session, other)
        newest = await list_files(session, tenant)
        assert [file.id for file in newest.items] == [batch, second, first]
        oldest = await list_files(session, tenant, purpose="fine-tune", newest_first=False, limit=1)
        assert [file.id for file in oldest.items] == [first] and oldest.has_more
        with pytest.raises(NotFoundError):
            await get_file(session, tenant, foreign)


async def test_a_deleted_or_expired_file_is_gone(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        tenant, other = await make_tenant(session), await make_tenant(session, "other")
        file_id = await make_file(session, tenant)
        expired = await make_file(session, tenant, expires_after_s=-1)
        with pytest.raises(NotFoundError):
            await delete_file(session, other, file_id)
        await delete_file(session, tenant, file_id)
        for gone in (file_id, expired):
            with pytest.raises(NotFoundError):
                await get_file(session, tenant, gone)
        assert (await list_files(session, tenant)).items == []
        task = (await session.scalars(select(BgTask))).one()
        assert (task.kind, task.ref) == ("delete_object", f"files/{tenant}/{file_id}")


async def test_usage_counts_once_however_often_it_is_sent(session_factory: SessionFactory) -> None:
    async with session_factory.begin() as session:
        tenant = await make_tenant(session)
    usage = InferenceUsage(
        request_id="r1", tenant_id=tenant, model="tiny", prompt_tokens=3, completion_tokens=4
    )
    for usages in ([usage], [usage, usage.model_copy(update={"request_id": "r2"})], []):
        async with session_factory.begin() as session:
            await record_inference(session, usages)
    async with session_factory.begin() as session:
        total = await session.scalar(select(func.sum(UsageRecord.completion_tokens)))
    assert total == 8


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        ("My Bot v2", "my-bot-v2"),
        ("a..b", "a.b"),
        ("--x--", "x"),
        ("Ünï", "n"),
        ("../etc/passwd", "etc-passwd"),
    ],
)
def test_a_suffix_becomes_a_plain_adapter_name(suffix: str, name: str) -> None:
    assert adapter_name_of(suffix) == name


@pytest.mark.parametrize("suffix", ["", "..", "日本", "---", "\n"])
def test_a_suffix_without_a_letter_is_refused(suffix: str) -> None:
    with pytest.raises(ValueError, match="suffix"):
        adapter_name_of(suffix)
