from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from services.adapter_store.main import create_app
from shared.config import Settings
from tests.adapter_store.console_client import Operator


@pytest.fixture
async def app(settings: Settings) -> AsyncIterator[FastAPI]:
    """The store with its loop running."""
    app = create_app(settings.model_copy(update={"dispatch_s": 0.05}))
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://store") as client:
        yield client


@pytest.fixture
def worker(client: httpx.AsyncClient, settings: Settings) -> httpx.AsyncClient:
    """A client with the workers' token."""
    client.headers["authorization"] = f"Bearer {settings.internal_token.get_secret_value()}"
    client.headers["content-type"] = "application/json"
    return client


@pytest.fixture
async def operator(client: httpx.AsyncClient) -> Operator:
    """Signed in to the console."""
    operator = Operator(client)
    await operator.sign_in()
    return operator
