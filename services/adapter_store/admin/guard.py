"""What stands in front of every page: default-deny on sessions, and the headers that browsers act on."""

from __future__ import annotations

from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.adapter_store.admin.auth import Gate, new_session

COOKIE = "flexllm_admin"
LOGIN = "/login"
STATIC = "/static/"
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class Guard:
    """Puts the caller's session into `request.state.session`; only the login and static files do without."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        session = self._gate.open(request.cookies.get(COOKIE)) or new_session(is_operator=False)
        request.state.session = session
        is_static = path.startswith(STATIC)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers["cache-control"] = "public, max-age=31536000" if is_static else "no-store"
            await send(message)

        if session.is_operator or path == LOGIN or is_static:
            await self.app(scope, receive, send_with_headers)
        else:
            await refusal(request)(scope, receive, send_with_headers)


def refusal(request: Request) -> Response:
    """To the login; a page that refreshes itself is told to go there as a whole."""
    login = request.scope.get("root_path", "") + LOGIN
    if "hx-request" in request.headers:
        return Response(status_code=401, headers={"hx-redirect": login})
    if request.method != "GET":
        return RedirectResponse(login, 303)
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"{login}?next={quote(target, safe='')}", 303)
