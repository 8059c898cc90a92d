"""API keys: found in the header, verified once a minute, required everywhere but on a few public paths."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass

import structlog
from pydantic import SecretStr
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from services.api.errors import error_response, unavailable
from shared.db import SessionFactory
from shared.errors import NotAuthenticatedError, ServiceError
from shared.keys import KeyOwner, verify_key

log = structlog.get_logger()

PUBLIC = frozenset({"/livez", "/readyz", "/metrics"})
FRESH_S = 60.0  # a revoked key works no longer than this
STALE_S = 600.0  # ... but while the database is away
MAX_CACHED_KEYS = 10_000


@dataclass(frozen=True, slots=True)
class CachedOwner:
    owner: KeyOwner
    verified_at: float


class KeyCache:
    """Owners of valid keys, by the keys' hashes. Keys that are not valid are looked up each time."""

    def __init__(self, sessions: SessionFactory, pepper: SecretStr, fresh_s: float = FRESH_S) -> None:
        self._sessions = sessions
        self._pepper = pepper
        self._fresh_s = fresh_s
        self._owners: OrderedDict[bytes, CachedOwner] = OrderedDict()

    async def find_owner(self, key: str) -> KeyOwner | None:
        """Raises SQLAlchemyError where the database is away and the key was not seen lately."""
        name = hashlib.sha256(key.encode()).digest()
        cached, now = self._owners.get(name), time.monotonic()
        if cached is not None and now - cached.verified_at < self._fresh_s:
            return cached.owner
        try:
            async with self._sessions.begin() as session:
                owner = await verify_key(session, self._pepper, key)
        except (SQLAlchemyError, OSError):
            if cached is not None and now - cached.verified_at < STALE_S:
                return cached.owner
            raise
        self._owners.pop(name, None)
        if owner is not None:
            self._owners[name] = CachedOwner(owner, now)
            if len(self._owners) > MAX_CACHED_KEYS:
                self._owners.popitem(last=False)
        return owner


class Authentication:
    """ASGI: nobody passes without a valid key, whatever the path, except to the public ones by their exact name.

    The owner of the key is left in `scope["owner"]`.
    """

    def __init__(self, app: ASGIApp, keys: KeyCache) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or is_public(scope):
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} connections are not served")
        try:
            scope["owner"] = await self._authenticate(Headers(scope=scope))
        except ServiceError as error:
            return await error_response(error)(scope, receive, send)
        except (SQLAlchemyError, OSError) as error:
            log.warning("keys_unavailable", error=type(error).__name__)
            return await error_response(unavailable(error))(scope, receive, send)
        await self._app(scope, receive, send)

    async def _authenticate(self, headers: Headers) -> KeyOwner:
        values = headers.getlist("authorization")
        if len(values) != 1:
            raise NotAuthenticatedError(
                "You didn't provide an API key. Send the header `Authorization: Bearer <key>`."
            )
        scheme, _, key = values[0].partition(" ")
        owner = await self._keys.find_owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise NotAuthenticatedError("Incorrect API key provided.")
        return owner


def is_public(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] in PUBLIC
