"""The registry: adapters, their versions, and which of them the aliases serve."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Query
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.responses import HTMLResponse, RedirectResponse

from services.adapter_store.admin.comparison import Comparison, compare
from services.adapter_store.admin.console import ACTOR, Database, Page, Render
from services.adapter_store.admin.queries import adapters, tenants
from shared.models import Adapter, AdapterVersion
from shared.registry import LIVE
from shared.versions import drop_alias, get_version, move_alias, retire_version, roll_back

router = APIRouter(prefix="/adapters")
AliasName = Annotated[str, Form(pattern=r"^[a-z][a-z0-9._-]{0,62}$")]


@router.get("")
async def adapter_list(
    page: Render, db: Database, org: str = "", q: Annotated[str, Query(max_length=100)] = ""
) -> HTMLResponse:
    return page(
        "adapters.html",
        rows=await adapters.list_adapters(db, org=org, words=q.strip()),
        orgs=await tenants.list_orgs(db),
        org=org,
        words=q,
    )


@router.get("/{adapter_id}")
async def adapter_detail(
    page: Render, db: Database, adapter_id: str, left: int | None = None, right: int | None = None
) -> HTMLResponse:
    found = await adapters.get_adapter_page(db, adapter_id)
    return page("adapter.html", found=found, comparison=choose_comparison(found, left, right))


def choose_comparison(found: adapters.AdapterPage, left: int | None, right: int | None) -> Comparison | None:
    """As asked, else the newest version with the live one, or with the one before."""
    if len(found.versions) < 2:
        return None
    newest = found.find_version(right) or found.versions[0]
    live = found.live.version if found.live else None
    others = [version for version in found.versions if version is not newest]
    other = found.find_version(left) or (live if live in others else others[0])
    return compare(other, newest)


@router.post("/{adapter_id}/promote")
async def promote(
    page: Render, db: Database, adapter_id: str, version: Annotated[int, Form()]
) -> RedirectResponse:
    adapter = await adapters.get_adapter(db, adapter_id, lock=True)
    await move_alias(db, adapter, LIVE, await get_version(db, adapter, version), actor=ACTOR)
    return back_to(page, adapter, f"Version {version} is live.")


@router.post("/{adapter_id}/roll-back")
async def roll_back_alias(
    page: Render, db: Database, adapter_id: str, alias: AliasName = LIVE
) -> RedirectResponse:
    adapter = await adapters.get_adapter(db, adapter_id, lock=True)
    row = await roll_back(db, adapter, alias, actor=ACTOR)
    return back_to(page, adapter, f"{alias} is back at version {await number_of(db, row.version_id)}.")


@router.post("/{adapter_id}/aliases")
async def set_alias(
    page: Render,
    db: Database,
    adapter_id: str,
    alias: AliasName,
    version: Annotated[int, Form()],
    canary: Annotated[int, Form()] = 0,
    canary_percent: Annotated[int, Form(ge=0, le=100)] = 0,
) -> RedirectResponse:
    """A canary of 0 is none: versions count from 1."""
    adapter = await adapters.get_adapter(db, adapter_id, lock=True)
    target = await get_version(db, adapter, version)
    tried = await get_version(db, adapter, canary) if canary and canary_percent else None
    await move_alias(
        db, adapter, alias, target, actor=ACTOR, canary=tried, canary_percent=canary_percent if tried else 0
    )
    part = f", {canary_percent} % of it to version {canary}" if tried else ""
    return back_to(page, adapter, f"{alias} points to version {version}{part}.")


@router.post("/{adapter_id}/drop-alias")
async def remove_alias(page: Render, db: Database, adapter_id: str, alias: AliasName) -> RedirectResponse:
    adapter = await adapters.get_adapter(db, adapter_id, lock=True)
    await drop_alias(db, adapter, alias, actor=ACTOR)
    return back_to(page, adapter, f"The alias {alias} is gone.")


@router.post("/{adapter_id}/retire")
async def retire(
    page: Render, db: Database, adapter_id: str, version: Annotated[int, Form()]
) -> RedirectResponse:
    adapter = await adapters.get_adapter(db, adapter_id, lock=True)
    await retire_version(db, adapter, await get_version(db, adapter, version), actor=ACTOR)
    return back_to(page, adapter, f"Version {version} is retired.")


async def number_of(db: AsyncSession, version_id: str) -> int:
    return (await db.get_one(AdapterVersion, version_id)).version


def back_to(page: Page, adapter: Adapter, message: str) -> RedirectResponse:
    return page.done(f"/adapters/{adapter.id}", message)
