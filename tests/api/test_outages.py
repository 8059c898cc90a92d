"""What goes on, and what is refused quickly, while Redis or Postgres is away."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psycopg
import pytest

from services.embedded import EmbeddedRedis
from shared.config import Settings
from tests.api.conftest import TEXT, Api, ServerThread, free_port
from tests.api.test_streams import eventually
from tests.stub_worker import StubWorker

MESSAGES = [{"role": "user", "content": "hi"}]


def test_without_redis_inference_is_refused_at_once_and_the_rest_works(
    api_settings: Settings, idle_api: Api, tmp_path: Path
) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        own = api_settings.model_copy(
            update={
                "redis_url": server.url,
                "api_port": free_port(),
                "celery_broker_url": server.url,
            }
        )
        with ServerThread(own):
            api = Api(own, idle_api.tokenizer)
            client = api.openai()
            with StubWorker(server.url, own, "w", api.answer):
                assert client.chat.completions.create(model="tiny", messages=MESSAGES).usage
            assert server.process is not None
            server.process.kill()
            server.process.wait()
            for _ in range(3):
                started = time.monotonic()
                with pytest.raises(openai.InternalServerError) as caught:
                    client.chat.completions.create(model="tiny", messages=MESSAGES)
                assert caught.value.status_code == 503
                assert caught.value.response.headers["retry-after"]
                assert time.monotonic() - started < 5
            file = client.files.create(file=("a", b"x"), purpose="fine-tune")
            assert client.files.retrieve(file.id) == file
            server.launch()
            with StubWorker(server.url, own, "w2", api.answer):
                patient = client.with_options(max_retries=5)
                answer = patient.chat.completions.create(model="tiny", messages=MESSAGES)
                assert answer.choices[0].message.content == TEXT


@contextmanager
def database_away(api: Api, admin: psycopg.Connection) -> Iterator[None]:
    name = api.settings.database_url.split("@/")[1].split("?")[0]
    admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
    try:
        yield
    finally:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_without_postgres_known_keys_go_on_and_their_usage_is_kept(
    api: Api, postgres_admin: psycopg.Connection
) -> None:
    client = api.openai()
    client.chat.completions.create(model="tiny", messages=MESSAGES)
    with database_away(api, postgres_admin):
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert answer.choices[0].message.content == TEXT
        with pytest.raises(openai.InternalServerError) as caught:
            client.files.list()
        assert (caught.value.status_code, caught.value.code) == (503, "database_unavailable")
        with api.http(org=None) as http:
            unknown = {"authorization": "Bearer sk-flexllm-000000000000-" + "A" * 43}
            assert http.get("/v1/models", headers=unknown).status_code == 503
            assert http.get("/readyz").json()["problems"] == {"database": "OperationalError"}
        [spooled] = (api.settings.spool_dir / "usage").glob("*.jsonl")
        assert answer.id in spooled.read_text()
    os.utime(spooled, (0, 0))  # as if its process had died
    with ServerThread(api.settings.model_copy(update={"api_port": free_port()})):
        assert eventually(lambda: num_billed(api) == 2, timeout_s=20)


def num_billed(api: Api) -> int:
    with psycopg.connect(api.settings.database_url.replace("+psycopg", ""), options="-c app.tenant=*") as db:
        return db.execute("SELECT count(*) FROM usage_record").fetchone()[0]
