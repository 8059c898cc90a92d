"""The customers' web API, OpenAI's on the wire."""

from __future__ import annotations

import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI

from services.api import errors
from services.api.adapters import ModelResolver
from services.api.auth import Authentication, KeyCache
from services.api.limits import ConcurrencyLimit, Door
from services.api.metrics import Metrics, Observation
from services.api.model import BaseModel
from services.api.routes import chat, completions, files, fine_tuning, health, models
from services.api.state import ApiState
from services.api.usage import UsageLog
from shared.celery import TaskSender
from shared.config import Settings
from shared.db import make_engine, session_factory
from shared.keys import check_pepper
from shared.queue import InferenceClient, open_async_redis
from shared.storage import ObjectStore

ROUTERS = (health, models, files, fine_tuning, chat, completions)
DRAIN_S = 10.0  # for bills and messages after the last response


def create_app(settings: Settings) -> FastAPI:
    """Refuses to be made without the secret of the API keys or without the model's tokenizer."""
    check_pepper(settings.key_pepper)
    base = BaseModel.load(settings)
    engine = make_engine(settings)
    sessions = session_factory(engine)
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        api_id = f"{socket.gethostname()}-{secrets.token_hex(6)}"
        async with AsyncExitStack() as stack:
            stack.push_async_callback(engine.dispose)
            redis = await stack.enter_async_context(open_async_redis(settings.redis_url))
            queue = await stack.enter_async_context(InferenceClient(redis, settings, api_id))
            tasks = TaskSender(settings)
            stack.callback(tasks.close)
            state = ApiState(
                settings=settings,
                sessions=sessions,
                store=ObjectStore.from_settings(settings),
                redis=redis,
                queue=queue,
                base=base,
                models=ModelResolver(sessions, base),
                usage=UsageLog(sessions, settings.spool_dir, api_id),
                tasks=tasks,
                limit=ConcurrencyLimit(settings.max_sequences_per_tenant),
                metrics=metrics,
            )
            stack.push_async_callback(state.background.drain, DRAIN_S)
            reloading = state.background.spawn(state.usage.reload_forever())
            stack.callback(reloading.cancel)
            app.state.api = state
            yield

    app = FastAPI(
        title="FlexLLM",
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    errors.install(app)
    for part in ROUTERS:
        app.include_router(part.router)
    app.add_middleware(Authentication, keys=KeyCache(sessions, settings.key_pepper))
    app.add_middleware(Observation, metrics=metrics)
    app.add_middleware(Door)  # the last added is the outermost
    return app
