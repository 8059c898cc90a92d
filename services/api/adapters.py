"""From a request's model name to what serves it. An unknown name is never the base model."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

import structlog
from sqlalchemy.exc import SQLAlchemyError

from services.api.model import BaseModel
from shared.db import SessionFactory, tenant_transaction
from shared.errors import NotFoundError
from shared.messages import AdapterRef
from shared.registry import resolve_model

log = structlog.get_logger()
STALE_S = 600.0  # how long a name keeps its last meaning while the database is away
MAX_REMEMBERED = 10_000
SHOWN_DIGEST_CHARS = 12


@dataclass(frozen=True, slots=True)
class Target:
    """The model of one request, pinned to its end."""

    model: str  # as the client named it
    base_digest: str
    adapter: AdapterRef | None = None

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: equal fingerprints are equal weights."""
        base = f"fp_{self.base_digest[:SHOWN_DIGEST_CHARS]}"
        return f"{base}_{self.adapter.digest[:SHOWN_DIGEST_CHARS]}" if self.adapter else base

    @property
    def num_virtual_tokens(self) -> int:
        return self.adapter.num_virtual_tokens if self.adapter else 0

    @property
    def headers(self) -> dict[str, str]:
        return {"x-adapter-version": self.adapter.digest} if self.adapter else {}


def unknown_model(name: str) -> NotFoundError:
    message = f"The model `{name}` does not exist or you do not have access to it."
    return NotFoundError(message, code="model_not_found", param="model")


class ModelResolver:
    def __init__(self, sessions: SessionFactory, base: BaseModel) -> None:
        self._sessions = sessions
        self._base = base
        self._remembered: OrderedDict[tuple[str, str], tuple[AdapterRef, float]] = OrderedDict()

    async def resolve(self, tenant_id: str, name: str) -> Target:
        """Raises NotFoundError (`model_not_found`)."""
        if name == self._base.id:
            return Target(name, self._base.base_digest)
        adapter = await self._find(tenant_id, name)
        if adapter is None:
            raise unknown_model(name)
        return Target(name, self._base.base_digest, adapter)

    async def _find(self, tenant_id: str, name: str) -> AdapterRef | None:
        """From the registry; while it is away, from memory: the bytes of a version do not change."""
        key, now = (tenant_id, name), time.monotonic()
        if "\0" in name:  # no name, and no text for Postgres
            return None
        try:
            async with tenant_transaction(self._sessions, tenant_id) as session:
                found = await resolve_model(session, tenant_id, name, base_digest=self._base.base_digest)
        except (SQLAlchemyError, OSError) as error:
            known = self._remembered.get(key)
            if known is None or now - known[1] > STALE_S:
                raise
            log.warning("registry_unavailable", error=type(error).__name__, model=name)
            return known[0]
        self._remembered.pop(key, None)
        if found is not None:
            self._remembered[key] = (found, now)
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return found
