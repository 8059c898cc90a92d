"""What an operator changes: each change is done, audited as the operator's, told once, and redirected."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import select

from shared.config import Settings
from shared.db import SessionFactory
from shared.keys import SCOPES, create_key, verify_key
from shared.models import Adapter, AdapterAlias, AdapterVersion, ApiKey, AuditLog, FtJob, Tenant
from tests.adapter_store.console_client import Operator
from tests.records import claim_job, make_job, make_queued_job, make_tenant, publish_job

KEY = re.compile(r"sk-flexllm-[0-9a-f]{12}-[\w-]{43}")


async def make_versions(factory: SessionFactory, count: int) -> str:
    """The id of the adapter `acme/bot`, whose alias `live` is at version 1."""
    for number in range(count):
        job_id = await make_queued_job(factory, suffix="bot")
        await publish_job(factory, job_id, str(number).encode())
    async with factory.begin() as session:
        return await session.scalar(select(Adapter.id)) or ""


async def read_alias(factory: SessionFactory, name: str = "live") -> dict[str, Any]:
    """Version numbers."""
    async with factory.begin() as session:
        alias = (await session.scalars(select(AdapterAlias).where(AdapterAlias.name == name))).one()
        numbers = {row.id: row.version for row in await session.scalars(select(AdapterVersion))}
    return {
        "version": numbers[alias.version_id],
        "previous": numbers.get(alias.previous_version_id or ""),
        "canary": numbers.get(alias.canary_version_id or ""),
        "percent": alias.canary_percent,
    }


async def audited(factory: SessionFactory) -> list[tuple[str, str]]:
    """(action, object) of what the operator did."""
    async with factory.begin() as session:
        lines = await session.scalars(select(AuditLog).where(AuditLog.actor == "admin").order_by(AuditLog.id))
        return [(line.action, line.object_id) for line in lines]


async def status_of(factory: SessionFactory, job_id: str) -> str:
    async with factory.begin() as session:
        return (await session.get_one(FtJob, job_id)).status


async def test_a_queued_job_is_paused_resumed_and_cancelled(
    operator: Operator, session_factory: SessionFactory
) -> None:
    job_id = await make_queued_job(session_factory)
    for move, status, words in (
        ("pause", "paused", "The job is paused."),
        ("resume", "queued", "The job goes on."),
        ("cancel", "cancelled", "The job is cancelled."),
    ):
        assert await operator.change(f"/jobs/{job_id}/{move}") == ("ok", words)
        assert await status_of(session_factory, job_id) == status
    expected = [("job.pause", job_id), ("job.resume", job_id), ("job.cancel", job_id)]
    assert await audited(session_factory) == expected


async def test_a_running_job_is_asked_to_stop(operator: Operator, session_factory: SessionFactory) -> None:
    job_id = await make_queued_job(session_factory)
    await claim_job(session_factory, job_id)
    assert await operator.change(f"/jobs/{job_id}/pause") == (
        "ok",
        "The job pauses after its next checkpoint.",
    )
    assert "Pausing" in await operator.read(f"/jobs/{job_id}")
    assert await operator.change(f"/jobs/{job_id}/resume") == ("ok", "The job goes on.")
    assert await operator.change(f"/jobs/{job_id}/cancel") == ("ok", "The worker is asked to stop the job.")
    page = await operator.read(f"/jobs/{job_id}")
    assert "Cancelling" in page and "Cancel job" not in page


async def test_what_cannot_be_done_is_said_on_the_page_and_not_audited(
    operator: Operator, session_factory: SessionFactory
) -> None:
    async with session_factory.begin() as session:
        job = await make_job(session, await make_tenant(session))
    level, words = await operator.change(f"/jobs/{job.id}/pause", came_from=f"/jobs/{job.id}")
    assert (level, words) == ("error", "a job that is validating_files cannot be paused")
    assert await audited(session_factory) == []


async def test_a_flash_is_shown_once_and_not_by_a_refresh(
    operator: Operator, session_factory: SessionFactory
) -> None:
    job_id = await make_queued_job(session_factory)
    await operator.post(f"/jobs/{job_id}/pause")
    refreshed = await operator.get(f"/jobs/{job_id}", **{"hx-request": "true"})
    assert 'class="banner banner-ok"' not in refreshed.text
    first, second = await operator.read("/jobs"), await operator.read("/jobs")
    assert 'class="banner banner-ok"' in first and 'class="banner banner-ok"' not in second


async def test_a_forged_flash_is_not_shown(operator: Operator) -> None:
    for value in ("5b226f6b222c2278225d", "x.y.z", "operator"):
        operator.client.cookies.set("flexllm_flash", value, domain="store.local", path="/admin")
        assert 'role="status"' not in await operator.read("/jobs")


async def test_a_version_is_promoted_and_rolled_back(
    operator: Operator, session_factory: SessionFactory
) -> None:
    adapter_id = await make_versions(session_factory, 2)
    path = f"/adapters/{adapter_id}"
    assert await operator.change(f"{path}/promote", version=2) == ("ok", "Version 2 is live.")
    assert await read_alias(session_factory) == {"version": 2, "previous": 1, "canary": None, "percent": 0}
    assert await operator.change(f"{path}/roll-back", alias="live") == ("ok", "live is back at version 1.")
    assert (await read_alias(session_factory))["version"] == 1
    assert await audited(session_factory) == [("alias.move", adapter_id)] * 2


async def test_there_is_nothing_to_roll_back_at_first(
    operator: Operator, session_factory: SessionFactory
) -> None:
    path = f"/adapters/{await make_versions(session_factory, 1)}"
    level, words = await operator.change(f"{path}/roll-back", came_from=path)
    assert level == "error" and "has not moved yet" in words


async def test_a_canary_is_set_and_ended(operator: Operator, session_factory: SessionFactory) -> None:
    path = f"/adapters/{await make_versions(session_factory, 2)}"
    _, words = await operator.change(f"{path}/aliases", alias="live", version=1, canary=2, canary_percent=15)
    assert words == "live points to version 1, 15 % of it to version 2."
    assert await read_alias(session_factory) == {"version": 1, "previous": None, "canary": 2, "percent": 15}
    await operator.change(f"{path}/aliases", alias="live", version=1, canary=0, canary_percent=15)
    assert (await read_alias(session_factory))["canary"] is None


async def test_an_alias_is_made_and_removed(operator: Operator, session_factory: SessionFactory) -> None:
    path = f"/adapters/{await make_versions(session_factory, 2)}"
    await operator.change(f"{path}/aliases", alias="staging", version=2)
    assert (await read_alias(session_factory, "staging"))["version"] == 2
    assert await operator.change(f"{path}/drop-alias", alias="staging") == (
        "ok",
        "The alias staging is gone.",
    )
    assert "staging</span>" not in await operator.read(path)


async def test_a_version_is_retired_unless_it_is_served(
    operator: Operator, session_factory: SessionFactory
) -> None:
    adapter_id = await make_versions(session_factory, 2)
    path = f"/adapters/{adapter_id}"
    level, words = await operator.change(f"{path}/retire", version=1, came_from=path)
    assert (level, words) == ("error", "version 1 is served as live")
    assert await operator.change(f"{path}/retire", version=2) == ("ok", "Version 2 is retired.")
    assert "Retired" in await operator.read(path)
    level, words = await operator.change(f"{path}/promote", version=2, came_from=path)
    assert (level, words) == ("error", "version 2 is RETIRED, not READY")
    assert [action for action, _ in await audited(session_factory)] == ["version.retire"]


@pytest.mark.parametrize(
    ("action", "fields"),
    [
        ("promote", {}),
        ("promote", {"version": "x"}),
        ("aliases", {"alias": "<b>", "version": 1}),
        ("aliases", {"alias": "Live", "version": 1}),
        ("aliases", {"alias": "live\n", "version": 1}),
        ("aliases", {"alias": "live", "version": 1, "canary": 1, "canary_percent": 101}),
    ],
)
async def test_a_form_that_makes_no_sense_changes_nothing(
    operator: Operator, session_factory: SessionFactory, action: str, fields: dict[str, str | int]
) -> None:
    path = f"/adapters/{await make_versions(session_factory, 1)}"
    level, words = await operator.change(f"{path}/{action}", came_from=path, **fields)
    assert level == "error" and "not understood" in words
    assert await audited(session_factory) == []


async def test_a_change_of_what_is_not_there_is_not_found(operator: Operator) -> None:
    for path in ("/jobs/ftjob-x/cancel", "/adapters/adpt_x/roll-back", "/tenants/x/keys/y/revoke"):
        assert (await operator.post(path)).status_code == 404, path


async def test_a_key_is_shown_once_works_and_is_revoked(
    operator: Operator, settings: Settings, session_factory: SessionFactory
) -> None:
    async with session_factory.begin() as session:
        await make_tenant(session)
    answer = await operator.post("/tenants/acme/keys", name="ci", scopes=["infer", "admin"], days=30)
    assert answer.status_code == 303 and not KEY.search(str(answer.headers))
    shown = KEY.search(await operator.read("/tenants/acme"))
    assert shown is not None
    assert not KEY.search(await operator.read("/tenants/acme"))
    async with session_factory.begin() as session:
        owner = await verify_key(session, settings.key_pepper, shown[0])
    assert owner is not None and owner.org == "acme" and owner.scopes == {"infer", "admin"}
    assert await operator.change(f"/tenants/acme/keys/{owner.key_id}/revoke") == ("ok", "The key is revoked.")
    async with session_factory.begin() as session:
        assert await verify_key(session, settings.key_pepper, shown[0]) is None
    assert await audited(session_factory) == [("key.create", owner.key_id), ("key.revoke", owner.key_id)]


async def test_a_new_key_is_shown_to_who_made_it_only(
    operator: Operator, client: httpx.AsyncClient, session_factory: SessionFactory
) -> None:
    async with session_factory.begin() as session:
        await make_tenant(session)
        await make_tenant(session, "other")
    await operator.post("/tenants/acme/keys", name="ci", scopes=["infer"])
    assert not KEY.search(await operator.read("/tenants/other"))
    kept = dict(client.cookies)
    client.cookies.clear()
    await operator.sign_in()
    assert not KEY.search(await operator.read("/tenants/acme"))
    client.cookies.clear()
    client.cookies.update(kept)
    assert KEY.search(await operator.read("/tenants/acme"))


@pytest.mark.parametrize(
    "fields", [{"name": "x"}, {"name": "", "scopes": ["infer"]}, {"name": "x", "scopes": ["root"]}]
)
async def test_a_key_needs_a_name_and_known_scopes(
    operator: Operator, session_factory: SessionFactory, fields: dict[str, str | list[str]]
) -> None:
    async with session_factory.begin() as session:
        await make_tenant(session)
    level, _ = await operator.change("/tenants/acme/keys", came_from="/tenants/acme", **fields)
    assert level == "error"
    async with session_factory.begin() as session:
        assert (await session.scalars(select(ApiKey))).all() == []


async def test_a_tenant_is_made_once(operator: Operator, session_factory: SessionFactory) -> None:
    fields = {"name": "Acme Robotics", "slug": "acme", "weight": "2.5"}
    level, words = await operator.change("/tenants", **fields)
    assert level == "ok" and words.startswith("Acme Robotics is here.")
    level, words = await operator.change("/tenants", came_from="/tenants", **fields)
    assert (level, words) == ("error", "there is a tenant 'acme' already")
    level, _ = await operator.change("/tenants", came_from="/tenants", **(fields | {"slug": "No Slug"}))
    assert level == "error"
    async with session_factory.begin() as session:
        tenant = (await session.scalars(select(Tenant))).one()
    assert (tenant.slug, tenant.weight) == ("acme", 2.5)
    assert (await audited(session_factory)) == [("tenant.create", tenant.id)]


async def test_the_key_of_a_customer_opens_nothing_here(
    operator: Operator, client: httpx.AsyncClient, settings: Settings, session_factory: SessionFactory
) -> None:
    async with session_factory.begin() as session:
        tenant_id = await make_tenant(session)
        _, key = await create_key(
            session, tenant_id, SecretStr("pepper-of-the-tests"), name="x", scopes=SCOPES
        )
    client.cookies.clear()
    assert (await operator.get("/", authorization=f"Bearer {key}")).status_code == 303
