"""No request makes the store hold more than it should: bodies here are small."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.adapter_store.errors import answer

MAX_BODY_BYTES = 4 << 20


class BodyTooLarge(Exception):
    """More came than was announced, or than is allowed."""


class BodyLimit:
    """Outermost: answers 413 to a body that announces too much, and breaks off one that grows too large."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._max_bytes:
            words = f"the body may have {self._max_bytes} bytes at most"
            await answer(413, words, "invalid_request_error", "request_too_large")(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise BodyTooLarge
            return message

        await self._app(scope, counted, send)
