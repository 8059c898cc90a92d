"""A real API server on a free port, a real queue behind it, and a worker that speaks the protocol."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import uvicorn

from services.api.server import make_config
from shared.config import Settings
from shared.db import make_engine, session_factory
from shared.keys import Scope, create_key, create_tenant, find_tenant
from shared.messages import GenerateRequest
from shared.tokenizer import ChatTokenizer
from tests.servers import empty, make_settings, own_database
from tests.stub_worker import StubWorker

if TYPE_CHECKING:
    import psycopg

    from services.embedded import EmbeddedPostgres, EmbeddedRedis

TEXT = "The quick brown fox jumps over the lazy dog."


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, which has OpenAI's shape whatever the route."""
    assert response.status_code >= 400
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert body["error"]["type"]
    return body["error"]


@dataclass
class Api:
    """The running server. `say` is the text that the worker answers with."""

    settings: Settings
    tokenizer: ChatTokenizer
    say: str = TEXT
    keys: dict[str, str] = field(default_factory=dict)
    requests: list[GenerateRequest] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.api_port}"

    def answer(self, request: GenerateRequest) -> list[int]:
        self.requests.append(request)
        return self.tokenizer.encode(self.say)[: request.sampling.max_tokens]

    def key(self, org: str = "acme", scopes: tuple[Scope, ...] = ("infer", "train")) -> str:
        """A key of this tenant, which is made at the first call."""
        name = f"{org} {' '.join(scopes)}"
        if name not in self.keys:
            self.keys[name] = asyncio.run(self._make_key(org, scopes))
        return self.keys[name]

    async def _make_key(self, org: str, scopes: tuple[Scope, ...]) -> str:
        engine = make_engine(self.settings, pooled=False)
        try:
            async with session_factory(engine).begin() as session:
                tenant = await find_tenant(session, org) or await create_tenant(session, org, org)
                _, key = await create_key(
                    session, tenant.id, self.settings.key_pepper, name="test", scopes=scopes
                )
                return key
        finally:
            await engine.dispose()

    def openai(self, org: str = "acme") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key(org), max_retries=0, timeout=20)

    def http(self, org: str | None = "acme") -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key(org)}"} if org else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, trust_env=False)


class ServerThread:
    """uvicorn with our own edge, on a thread with an event loop of its own."""

    def __init__(self, settings: Settings) -> None:
        self.server = uvicorn.Server(make_config(settings))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> ServerThread:
        self.thread.start()
        while not self.server.started:
            if not self.thread.is_alive():
                raise RuntimeError("the API did not start")
            self.thread.join(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def for_one_server(settings: Settings) -> Settings:
    """On a port of its own, which soon sees what a worker does."""
    return settings.model_copy(
        update={
            "api_port": free_port(),
            "max_model_len": 512,
            "owner_no_progress_s": 1.0,
            "lease_s": 1.0,
            "reap_s": 0.2,
            "beat_s": 0.1,
        }
    )


@pytest.fixture
def api_settings(settings: Settings) -> Settings:
    return for_one_server(settings)


@pytest.fixture
def idle_api(api_settings: Settings) -> Iterator[Api]:
    """Without a worker."""
    with ServerThread(api_settings):
        yield Api(api_settings, ChatTokenizer(api_settings.model_dir))


@pytest.fixture(scope="module")
def shared_api(
    postgres: EmbeddedPostgres,
    postgres_admin: psycopg.Connection,
    redis_server: EmbeddedRedis,
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Api]:
    """Without a worker, and one for all tests of a module that asks for nothing that changes anything."""
    empty(redis_server)
    folder = tmp_path_factory.mktemp("shared-api")
    with own_database(postgres, postgres_admin) as url:
        settings = for_one_server(make_settings(url, redis_server, tiny_model_dir, folder))
        with ServerThread(settings):
            yield Api(settings, ChatTokenizer(settings.model_dir))


@pytest.fixture
def file_id(idle_api: Api) -> str:
    """Of a file to train on, which nobody reads."""
    return idle_api.openai().files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune").id


@pytest.fixture
def make_worker(idle_api: Api) -> Callable[..., StubWorker]:
    """Not started: use as a context manager."""

    def make(name: str = "worker", **options: object) -> StubWorker:
        settings = idle_api.settings
        worker = StubWorker(settings.redis_url, settings, name, idle_api.answer, slots=64, **options)
        worker.beat()
        return worker

    return make


@pytest.fixture
def api(idle_api: Api, make_worker: Callable[..., StubWorker]) -> Iterator[Api]:
    with make_worker():
        yield idle_api
