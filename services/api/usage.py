"""Usage records: into Postgres before the answer ends, or onto the disk while Postgres is away."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import structlog
from sqlalchemy.exc import SQLAlchemyError

from shared.db import SessionFactory
from shared.usage import InferenceUsage, record_inference

log = structlog.get_logger()
MAX_SPOOL_BYTES = 64 << 20
RELOAD_S = 15.0
ABANDONED_S = 60.0  # a living process would have loaded its own file by then


class UsageLog:
    """Each record counts once, however often it is written: its id is the request's."""

    def __init__(self, sessions: SessionFactory, spool_dir: Path, api_id: str) -> None:
        self._sessions = sessions
        self._spool_dir = spool_dir / "usage"
        self._own_path = self._spool_dir / f"{api_id}.jsonl"
        self._own_file = asyncio.Lock()

    async def record(self, usage: InferenceUsage) -> None:
        try:
            async with self._sessions.begin() as session:
                await record_inference(session, [usage])
        except (SQLAlchemyError, OSError) as error:
            log.warning("usage_spooled", error=type(error).__name__, request_id=usage.request_id)
            async with self._own_file:
                await asyncio.to_thread(self._spool, usage)

    def _spool(self, usage: InferenceUsage) -> None:
        self._spool_dir.mkdir(parents=True, exist_ok=True)
        with self._own_path.open("a") as file:
            if file.tell() > MAX_SPOOL_BYTES:
                log.error("usage_lost", request_id=usage.request_id)
                return
            file.write(usage.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())

    async def reload_forever(self) -> None:
        """Brings spooled records into Postgres, also those of processes that have died."""
        while True:
            async with self._own_file:
                await self.reload(self._own_path)
            for path in await asyncio.to_thread(self._abandoned):
                await self.reload(path)
            await asyncio.sleep(RELOAD_S)

    def _abandoned(self) -> list[Path]:
        newest = time.time() - ABANDONED_S
        return [path for path in self._spool_dir.glob("*.jsonl") if path.stat().st_mtime < newest]

    async def reload(self, path: Path) -> None:
        try:
            lines = (await asyncio.to_thread(path.read_text)).splitlines()
            usages = [InferenceUsage.model_validate_json(line) for line in lines]
            for start in range(0, len(usages), 1000):
                async with self._sessions.begin() as session:
                    await record_inference(session, usages[start : start + 1000])
            await asyncio.to_thread(path.unlink, missing_ok=True)
        except FileNotFoundError:
            return
        except (SQLAlchemyError, OSError, ValueError) as error:
            log.warning("usage_not_loaded", file=path.name, error=type(error).__name__)
