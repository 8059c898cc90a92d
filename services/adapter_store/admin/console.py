"""What the views work with, and how they get at it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, cast

import redis.asyncio
from fastapi import Depends, Request
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.responses import HTMLResponse, RedirectResponse

from services.adapter_store.admin.auth import Gate, Session, Throttle
from services.adapter_store.admin.fleet import Fleet, read_fleet
from services.adapter_store.admin.pages import Pages
from shared.config import Settings
from shared.db import SessionFactory
from shared.errors import NotPermittedError

ACTOR = "admin"  # in the audit log


@dataclass(frozen=True, slots=True)
class Console:
    """`shown_once` holds a new key between its post and the page that shows it, by session and tenant."""

    settings: Settings
    factory: SessionFactory
    redis: redis.asyncio.Redis
    gate: Gate
    throttle: Throttle
    pages: Pages
    shown_once: dict[tuple[str, str], str]


@dataclass(frozen=True, slots=True)
class Page:
    """The answer to one request."""

    console: Console
    request: Request

    def __call__(self, template: str, *, status: int = 200, **context: Any) -> HTMLResponse:
        return self.console.pages.render(self.request, template, status, **context)

    def done(self, path: str, message: str) -> RedirectResponse:
        return self.console.pages.redirect(self.request, path, message)

    @property
    def session(self) -> Session:
        return cast(Session, self.request.state.session)


def get_console(request: Request) -> Console:
    return cast(Console, request.app.state.console)


Desk = Annotated[Console, Depends(get_console)]


def get_page(console: Desk, request: Request) -> Page:
    return Page(console, request)


async def transaction(console: Desk) -> AsyncIterator[AsyncSession]:
    """Committed before the answer leaves."""
    async with console.factory.begin() as session:
        yield session


async def fleet(console: Desk) -> Fleet:
    return await read_fleet(console.redis, console.settings)


async def check_form_token(console: Desk, request: Request) -> None:
    """Every post names the token of its own session."""
    if request.method in ("GET", "HEAD"):
        return
    form = await request.form(max_files=0, max_fields=20, max_part_size=16 * 1024)
    token = form.get("csrf_token")
    if not isinstance(token, str) or not console.gate.is_csrf_token(request.state.session, token):
        raise NotPermittedError("This form is out of date. Go back, reload the page and try again.")


Render = Annotated[Page, Depends(get_page)]
Database = Annotated[AsyncSession, Depends(transaction, scope="function")]
Workers = Annotated[Fleet, Depends(fleet)]
