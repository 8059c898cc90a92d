"""The HTTP edge: how long a client may take to say what it wants, and how much of it."""

from __future__ import annotations

import asyncio
from typing import ClassVar, Literal

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.api.limits import MAX_HEADER_BYTES
from services.api.main import create_app
from shared.config import Settings

UPLOAD_PATH = "/v1/files"
KEEP_ALIVE_S = 15
GRACE_S = 30  # for running requests at the end
Phase = Literal["headers", "body"]


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 with absolute deadlines: a client that dribbles holds no connection."""

    headers_s: ClassVar[float] = 10.0  # from the connection, or the first byte of the next request
    body_s: ClassVar[float] = 60.0
    upload_s: ClassVar[float] = 600.0
    max_connections: ClassVar[int] = 6000

    _timer: asyncio.TimerHandle | None = None
    _phase: Phase | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        self._enter("headers")

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._enter(self._phase_now())

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._enter(self._phase_now())

    def _phase_now(self) -> Phase | None:
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            return "headers"
        return None

    def _enter(self, phase: Phase | None) -> None:
        """A deadline runs from the start of its phase, however much arrives meanwhile."""
        if phase == self._phase:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._phase, self._timer = phase, None
        if phase is not None:
            self._timer = self.loop.call_later(self._limit_s(phase), self.transport.close)

    def _limit_s(self, phase: Phase) -> float:
        if phase == "headers":
            return self.headers_s
        return self.upload_s if self.scope["path"].startswith(UPLOAD_PATH) else self.body_s


def make_config(settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(settings),
        host=settings.api_host,
        port=settings.api_port,
        http=DeadlineProtocol,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        backlog=2048,
        log_level="warning",
        access_log=False,
        server_header=False,
    )


def serve(settings: Settings) -> None:
    """Until SIGTERM; then requests that run get `GRACE_S` to end."""
    uvicorn.Server(make_config(settings)).run()
