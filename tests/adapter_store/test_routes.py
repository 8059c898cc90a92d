"""The registry by API key."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import httpx
import pytest

from services.adapter_store.main import create_app
from shared.config import Settings
from shared.db import SessionFactory
from shared.keys import Scope, create_key
from shared.messages import ADAPTER_FILES
from shared.storage import ObjectStore
from tests.records import make_publish, make_queued_job, make_tenant, publish_job, put_adapter


async def make_headers(
    factory: SessionFactory, settings: Settings, slug: str = "acme", scopes: tuple[Scope, ...] = ("train",)
) -> dict[str, str]:
    async with factory.begin() as session:
        tenant = await make_tenant(session, slug)
        _, key = await create_key(session, tenant, settings.key_pepper, name="t", scopes=scopes)
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
async def bot(session_factory: SessionFactory, object_store: ObjectStore) -> list[str]:
    """Ids of the two versions of acme's adapter `bot`, with their files."""
    ids = []
    for weights in (b"one", b"two"):
        await put_adapter(object_store, make_publish(1, weights), weights)
        job_id = await make_queued_job(session_factory, suffix="bot")
        ids.append((await publish_job(session_factory, job_id, weights)).version_id)
    return ids


async def test_adapters_versions_and_files_are_read(
    client: httpx.AsyncClient, session_factory: SessionFactory, settings: Settings, bot: list[str]
) -> None:
    client.headers.update(await make_headers(session_factory, settings, scopes=("infer",)))
    [adapter] = (await client.get("/v1/adapters")).json()["data"]
    assert adapter["name"] == "bot"
    assert [(alias["name"], alias["version_id"]) for alias in adapter["aliases"]] == [("live", bot[0])]
    assert (await client.get("/v1/adapters/bot")).json() == adapter
    versions = (await client.get("/v1/adapters/bot/versions")).json()["data"]
    assert [version["id"] for version in versions] == bot[::-1]
    version = (await client.get("/v1/adapters/bot/versions/2")).json()
    assert version == versions[0] and version["hyperparameters"]["peft"]["rank"] == 16
    for name in ADAPTER_FILES:
        response = await client.get(f"/v1/adapters/bot/versions/2/files/{name}")
        assert hashlib.sha256(response.content).hexdigest() == version["files"][name]
    for missing in ("bot/versions/3", "bot/versions/0", "nobody", "bot/versions/2/files/..%2f..%2fx"):
        assert (await client.get(f"/v1/adapters/{missing}")).status_code in (400, 404)


async def test_a_version_is_promoted_rolled_back_and_retired_on_the_record(
    client: httpx.AsyncClient, session_factory: SessionFactory, settings: Settings, bot: list[str]
) -> None:
    client.headers.update(await make_headers(session_factory, settings))
    moved = await client.put("/v1/adapters/bot/aliases/live", json={"version": 2})
    assert (moved.json()["version_id"], moved.json()["previous_version_id"]) == (bot[1], bot[0])
    back = await client.post("/v1/adapters/bot/aliases/live/rollback")
    assert back.json()["version_id"] == bot[0]
    canary = {"version": 1, "canary_version": 2, "canary_percent": 10}
    assert (await client.put("/v1/adapters/bot/aliases/live", json=canary)).json()["canary_percent"] == 10
    refused = await client.post("/v1/adapters/bot/versions/2/retire")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "version_in_use")
    retired = await client.post("/v1/adapters/bot/versions/2/retire", json={"drop_aliases": True})
    assert retired.json()["state"] == "RETIRED"
    assert (await client.delete("/v1/adapters/bot/aliases/live")).status_code == 204
    assert (await client.delete("/v1/adapters/bot/aliases/live")).status_code == 404
    lines = (await client.get("/v1/audit", params={"limit": 5})).json()["data"]
    assert [line["action"] for line in lines] == [
        "alias.drop",
        "version.retire",
        "alias.move",
        "alias.move",
        "alias.move",
    ]
    assert all(line["actor"].startswith("key:") for line in lines)
    older = (await client.get("/v1/audit", params={"before": lines[-1]["id"]})).json()["data"]
    assert lines[-1]["id"] not in {line["id"] for line in older}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("aliases/live", {}),
        ("aliases/live", {"version": "1"}),
        ("aliases/live", {"version": True}),
        ("aliases/live", {"version": 1, "canary_percent": 101}),
        ("aliases/live", {"version": 1, "extra": 1}),
        ("aliases/Live", {"version": 1}),
        ("aliases/1", {"version": 1}),
        ("aliases/a%0a", {"version": 1}),
    ],
)
async def test_a_bad_request_is_refused(
    client: httpx.AsyncClient,
    session_factory: SessionFactory,
    settings: Settings,
    bot: list[str],
    path: str,
    body: dict[str, object],
) -> None:
    client.headers.update(await make_headers(session_factory, settings))
    response = await client.put(f"/v1/adapters/bot/{path}", json=body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_value"


async def test_another_tenants_adapters_do_not_exist(
    client: httpx.AsyncClient, session_factory: SessionFactory, settings: Settings, bot: list[str]
) -> None:
    client.headers.update(await make_headers(session_factory, settings, "other"))
    assert (await client.get("/v1/adapters")).json() == {"data": []}
    reads = ["", "/versions", "/versions/1", f"/versions/1/files/{ADAPTER_FILES[0]}"]
    answers = [await client.get(f"/v1/adapters/bot{path}") for path in reads]
    answers.append(await client.put("/v1/adapters/bot/aliases/live", json={"version": 2}))
    answers.append(await client.post("/v1/adapters/bot/aliases/live/rollback"))
    answers.append(await client.delete("/v1/adapters/bot/aliases/live"))
    answers.append(await client.post("/v1/adapters/bot/versions/2/retire"))
    missing = await client.get("/v1/adapters/nobody")
    for answer in answers:
        assert answer.status_code == 404
        assert (
            answer.json()["error"]["message"].replace("bot", "nobody") == missing.json()["error"]["message"]
        )
    assert all("bot" not in line["object_id"] for line in (await client.get("/v1/audit")).json()["data"])


async def test_scopes_decide_who_changes_and_who_acts_for_others(
    client: httpx.AsyncClient, session_factory: SessionFactory, settings: Settings, bot: list[str]
) -> None:
    reader = await make_headers(session_factory, settings, scopes=("infer",))
    trainer = await make_headers(session_factory, settings, "other")
    admin = await make_headers(session_factory, settings, "other", ("admin",))
    url, body = "/v1/adapters/bot/aliases/live", {"version": 2}
    assert (await client.put(url, json=body, headers=reader)).status_code == 403
    assert (await client.put(f"{url}?tenant=acme", json=body, headers=trainer)).status_code == 403
    assert (await client.put(f"{url}?tenant=acme", json=body, headers=admin)).status_code == 200
    assert (await client.get("/v1/adapters?tenant=nobody", headers=admin)).status_code == 404


async def test_no_route_is_open_but_the_health_checks(settings: Settings, client: httpx.AsyncClient) -> None:
    app = create_app(settings)
    open_paths = {"/livez", "/readyz", "/metrics"}
    schema = app.openapi()["paths"]
    assert len(schema) > 10
    assert (await client.get("/openapi.json")).status_code == 404
    for path, methods in schema.items():
        for method in methods:
            url = path.replace("{number}", "1").replace("{", "").replace("}", "")
            response = await client.request(method, url, json={})
            assert (response.status_code == 401) == (path not in open_paths), (method, path)


async def test_health_and_metrics(
    client: httpx.AsyncClient, session_factory: SessionFactory, bot: list[str]
) -> None:
    assert (await client.get("/livez")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json() == {"status": "ok", "problems": {}}
    text = (await client.get("/metrics")).text
    assert 'flexllm_jobs{status="succeeded"} 2.0' in text
    assert "flexllm_adapter_versions_ready 2.0" in text
    assert "flexllm_tasks_undone 2.0" in text and "flexllm_tasks_late_seconds 0.0\n" not in text


async def test_a_body_is_bounded_whether_it_says_so_or_not(
    client: httpx.AsyncClient, session_factory: SessionFactory, settings: Settings, bot: list[str]
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100_000

    client.headers.update(await make_headers(session_factory, settings))
    url = "/v1/adapters/bot/aliases/live"
    announced = await client.put(url, content=b" " * 5_000_000)
    assert (announced.status_code, announced.json()["error"]["code"]) == (413, "request_too_large")
    assert (await client.put(url, content=endless())).status_code == 400
    lying = await client.put(url, content=b"{}", headers={"content-length": "-1"})
    assert lying.status_code == 413


async def test_a_missing_dependency_is_named_and_answers_503(settings: Settings) -> None:
    away = settings.model_copy(
        update={
            "database_url": "postgresql+psycopg://flexllm@/x?host=/nonexistent",
            "redis_url": "unix:///nonexistent/redis.sock",
        }
    )
    app = create_app(away)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://s") as client,
    ):
        response = await client.get("/readyz")
        assert response.status_code == 503
        assert response.json()["problems"] == {"database": "OperationalError", "redis": "ConnectionError"}
        key = "sk-flexllm-" + "0" * 12 + "-" + "x" * 43
        response = await client.get("/v1/adapters", headers={"authorization": f"Bearer {key}"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "database_unavailable")
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("secret", ["internal_token", "key_pepper"])
def test_the_store_does_not_start_without_its_secrets(settings: Settings, secret: str) -> None:
    from pydantic import SecretStr

    with pytest.raises(ValueError, match=f"FLEXLLM_{secret.upper()}"):
        create_app(settings.model_copy(update={secret: SecretStr("")}))
