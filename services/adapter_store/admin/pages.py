"""From a template to a response, with what every page needs: addresses, the form token, the flash line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import orjson
from itsdangerous import BadSignature, TimestampSigner
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse

from services.adapter_store.admin import formats
from services.adapter_store.admin.auth import Gate, Session
from services.adapter_store.admin.guard import COOKIE

HERE = Path(__file__).parent
STATIC_DIR = HERE / "static"
FLASH_COOKIE = "flexllm_flash"
FLASH_TTL_S = 60
Level = Literal["ok", "error"]


def make_environment() -> Environment:
    """Everything is escaped; a name that a view forgot is an error."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= formats.FILTERS | {"since": since}
    environment.globals |= {"change": formats.change, "between": formats.between}
    return environment


def since(at: datetime | None) -> Markup:
    """Relative, with the exact time at hand."""
    if at is None:
        return Markup(formats.NOTHING)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        at.isoformat(), formats.stamp(at), formats.ago(at)
    )


def asset_versions() -> dict[str, str]:
    """File name -> start of its content hash, for addresses that may be cached for ever."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:10] for path in STATIC_DIR.iterdir()}


class Pages:
    def __init__(self, gate: Gate, served_model: str) -> None:
        self._gate = gate
        self._signer = TimestampSigner(gate.derive_key("flash"), digest_method=hashlib.sha256)
        self._environment = make_environment()
        self._environment.globals["served_model"] = served_model
        self._versions = asset_versions()

    def render(self, request: Request, template: str, status: int = 200, **context: Any) -> HTMLResponse:
        session: Session = request.state.session
        root = request.scope.get("root_path", "")
        is_refresh = "hx-request" in request.headers
        html = self._environment.get_template(template).render(
            context,
            root=root,
            path=request.url.path.removeprefix(root),
            query=request.url.query,
            asset=lambda name: f"{root}/static/{name}?v={self._versions[name]}",
            csrf=self._gate.csrf_token(session),
            is_operator=session.is_operator,
            flash=None if is_refresh else self._read_flash(request),
        )
        response = HTMLResponse(html, status)
        if FLASH_COOKIE in request.cookies and not is_refresh:
            response.delete_cookie(FLASH_COOKIE, path=cookie_path(request))
        return response

    def redirect(self, request: Request, path: str, message: str, level: Level = "ok") -> RedirectResponse:
        """After a post: to a page of the console that then says `message` once."""
        response = RedirectResponse(request.scope.get("root_path", "") + path, 303)
        text = orjson.dumps([level, message[:500]])
        set_cookie(request, response, FLASH_COOKIE, self._signer.sign(text.hex()).decode(), FLASH_TTL_S)
        return response

    def keep_session(
        self, request: Request, response: HTMLResponse | RedirectResponse, session: Session
    ) -> None:
        set_cookie(request, response, COOKIE, self._gate.seal(session))

    def _read_flash(self, request: Request) -> Mapping[str, str] | None:
        try:
            text = self._signer.unsign(request.cookies.get(FLASH_COOKIE, ""), max_age=FLASH_TTL_S)
        except BadSignature:
            return None
        level, message = orjson.loads(bytes.fromhex(text.decode()))
        return {"level": level, "message": message}


def cookie_path(request: Request) -> str:
    return request.scope.get("root_path", "") or "/"


def set_cookie(
    request: Request,
    response: HTMLResponse | RedirectResponse,
    name: str,
    value: str,
    max_age: int | None = None,
) -> None:
    response.set_cookie(
        name,
        value,
        max_age=max_age,
        path=cookie_path(request),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
