"""The adapter store: registry, job state machine, the workers' internal API, the operators' console."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import SecretStr

from services.adapter_store import errors, health, internal, routes
from services.adapter_store.admin import make_admin
from services.adapter_store.dispatch import Dispatcher
from services.adapter_store.limits import BodyLimit
from services.adapter_store.service import Services
from shared.config import Settings
from shared.db import make_engine, session_factory
from shared.keys import check_pepper
from shared.queue import open_async_redis
from shared.storage import ObjectStore

STOP_TIMEOUT_S = 5.0


def create_app(settings: Settings | None = None) -> FastAPI:
    """Refuses to be made without its secrets."""
    settings = settings or Settings()
    check_pepper(settings.key_pepper)
    check_internal_token(settings.internal_token)
    engine = make_engine(settings)
    sessions = session_factory(engine)
    client = open_async_redis(settings.redis_url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.redis = client
        app.state.services = Services(settings, sessions, ObjectStore.from_settings(settings))
        dispatcher = Dispatcher(sessions, client, settings.dispatch_s)
        loop = asyncio.create_task(dispatcher.run())
        yield
        dispatcher.stop()
        if not (await asyncio.wait({loop}, timeout=STOP_TIMEOUT_S))[0]:
            loop.cancel()
        await client.aclose()
        await engine.dispose()

    app = FastAPI(title="FlexLLM adapter store", lifespan=lifespan, openapi_url=None)
    app.add_middleware(BodyLimit)
    errors.install(app)
    for part in (health, internal, routes):
        app.include_router(part.router)
    app.mount("/admin", make_admin(settings, sessions, client))
    return app


def check_internal_token(token: SecretStr) -> None:
    if not token.get_secret_value():
        raise ValueError(
            "internal_token is empty: set FLEXLLM_INTERNAL_TOKEN to the secret that workers send"
        )
