"""Bounds at the door: request ids, bodies, nesting, and how much one tenant may have in flight."""

from __future__ import annotations

import re
import secrets
from collections import Counter
from typing import Any

import orjson
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.api.errors import PayloadTooLargeError, UnsupportedMediaTypeError, error_response
from shared.errors import InvalidRequestError, LimitExceededError

MAX_HEADER_BYTES = 32 << 10
MAX_JSON_BYTES = 4 << 20
MAX_JSON_DEPTH = 64
CLIENT_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Door:
    """ASGI: an id for every request, the client's own where it sent a usable one, and one meaning for each.

    A body framed in two ways is refused: a proxy in front may have read another request than we would.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if CLIENT_REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if (problem := header_problem(scope["headers"])) is not None:
            refusal = error_response(InvalidRequestError(problem))
            refusal.headers["connection"] = "close"
            return await refusal(scope, receive, send_with_id)
        await self._app(scope, receive, send_with_id)


def header_problem(headers: list[tuple[bytes, bytes]]) -> str | None:
    names = {name for name, _ in headers}
    if {b"content-length", b"transfer-encoding"} <= names:
        return "Both content-length and transfer-encoding were sent."
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        return f"The headers have more than {MAX_HEADER_BYTES} bytes."
    return None


async def read_json(request: Request) -> Any:
    """The body, parsed strictly: no NaN, no broken text, bounded in size and depth."""
    require_plain(request)
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise UnsupportedMediaTypeError(f"expected application/json, found {content_type[:100]}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise PayloadTooLargeError(f"the request body has more than {MAX_JSON_BYTES} bytes")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the request body is not JSON: {error}", code="invalid_json") from None
    check_depth(value)
    return value


def require_plain(request: Request) -> None:
    """Compressed bodies may be bombs."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaTypeError(f"content-encoding {encoding[:40]} is not supported")


def check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise InvalidRequestError(f"the request body is nested deeper than {MAX_JSON_DEPTH} levels")
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]


class ConcurrencyLimit:
    """How many sequences each tenant has in flight in this process."""

    def __init__(self, max_per_tenant: int) -> None:
        self._max = max_per_tenant
        self._in_flight: Counter[str] = Counter()

    def acquire(self, tenant_id: str, count: int) -> None:
        """Raises LimitExceededError, and then holds nothing."""
        if self._in_flight[tenant_id] + count > self._max:
            raise LimitExceededError(
                f"Rate limit reached: {self._in_flight[tenant_id]} sequences are in flight and the limit is "
                f"{self._max}. Try again when some have finished."
            )
        self._in_flight[tenant_id] += count

    def release(self, tenant_id: str, count: int) -> None:
        self._in_flight[tenant_id] -= count
        if not self._in_flight[tenant_id]:
            del self._in_flight[tenant_id]
