"""Who gets into the console, and what a browser is told about its pages."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import func, select

from services.adapter_store.admin import auth
from services.adapter_store.admin.auth import Gate, Throttle, new_session
from services.adapter_store.admin.main import VIEWS
from services.adapter_store.main import create_app
from shared.config import Settings
from shared.db import SessionFactory
from shared.models import Tenant
from tests.adapter_store.console_client import Operator

COOKIE = "flexllm_admin"
TENANT = {"name": "Acme", "slug": "acme", "weight": "1"}


@pytest.fixture
def operator(client: httpx.AsyncClient) -> Operator:
    """Not signed in yet."""
    return Operator(client)


@pytest.mark.parametrize("name", ["admin_password", "session_secret"])
def test_the_store_does_not_start_with_an_open_console(settings: Settings, name: str) -> None:
    empty = Settings(**{**dict(settings), name: ""})
    with pytest.raises(ValueError, match=f"{name} is empty"):
        create_app(empty)


async def test_the_password_opens_the_console(operator: Operator) -> None:
    assert (await operator.get("/")).headers["location"] == "/admin/login?next=%2Fadmin%2F"
    answer = await operator.sign_in(wanted="/admin/jobs?status=failed")
    assert (answer.status_code, answer.headers["location"]) == (303, "/admin/jobs?status=failed")
    assert "Overview" in await operator.read("/")
    assert (await operator.get("/login")).headers["location"] == "/admin/"


async def test_the_session_cookie_is_for_this_console_only(operator: Operator) -> None:
    cookie = (await operator.sign_in()).headers["set-cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Path=/admin"))
    assert "Secure" not in cookie


async def test_over_tls_cookies_are_secure(client: httpx.AsyncClient) -> None:
    client.base_url = httpx.URL("https://store")
    assert "Secure" in (await client.get("/admin/login")).headers["set-cookie"]


async def test_a_wrong_password_is_refused_and_then_has_to_wait(operator: Operator) -> None:
    for _ in range(5):
        answer = await operator.sign_in("guess")
        assert answer.status_code == 401 and "not the password" in answer.text
    blocked = await operator.sign_in()  # even the right one
    assert blocked.status_code == 429
    assert 0 < int(blocked.headers["retry-after"]) <= 300
    assert (await operator.get("/")).status_code == 303


def test_the_throttle_counts_by_network_and_forgets() -> None:
    throttle = Throttle(limit=2, window_s=60, max_addresses=2)
    for address in ("2001:db8::1", "2001:db8::2"):
        throttle.note_failure(address)
    assert 0 < throttle.wait_s("2001:db8::3") <= 60
    assert throttle.wait_s("2001:db8:0:1::1") == throttle.wait_s("192.0.2.1") == 0
    throttle.forget("2001:db8::9")
    assert throttle.wait_s("2001:db8::3") == 0
    short = Throttle(limit=1, window_s=0)
    short.note_failure("192.0.2.1")
    assert short.wait_s("192.0.2.1") == 0
    for i in range(5):
        throttle.note_failure(f"192.0.2.{i}")
        throttle.note_failure(f"192.0.2.{i}")
    assert [throttle.wait_s(f"192.0.2.{i}") > 0 for i in range(5)] == [False, False, False, True, True]


def addresses() -> Iterator[tuple[str, str]]:
    """Every (method, path) of the console, with ids filled in, and some that should not be there."""
    for view in VIEWS:
        for route in view.router.routes:
            assert isinstance(route, APIRoute)
            path = route.path.format(job_id="j", adapter_id="a", org="o", key_id="k")
            yield from ((method, path) for method in (*route.methods, "HEAD", "OPTIONS"))
    for path in ("/nope", "//", "/login/", "/static", "/%2e%2e/jobs", "/openapi.json", "/docs"):
        yield "GET", path


async def test_nothing_but_the_login_and_static_files_is_shown_to_a_stranger(
    client: httpx.AsyncClient,
) -> None:
    tried = list(addresses())
    assert len(tried) > 50
    for method, path in tried:
        answer = await client.request(method, f"/admin{path}")
        if path == "/login":
            assert answer.status_code in (200, 403, 405), (method, path)
        else:
            assert answer.status_code == 303, (method, path, answer.status_code)
            assert answer.headers["location"].startswith("/admin/login"), (method, path)


async def test_a_refreshing_page_of_a_stranger_is_sent_to_the_login(operator: Operator) -> None:
    answer = await operator.get("/jobs", **{"hx-request": "true"})
    assert (answer.status_code, answer.headers["hx-redirect"]) == (401, "/admin/login")


async def test_a_post_without_the_token_of_its_session_changes_nothing(
    operator: Operator, session_factory: SessionFactory
) -> None:
    await operator.read_token("/login")
    token_of_visitor = operator.token
    await operator.sign_in()
    for token in ("", "0" * 64, token_of_visitor, "ü"):
        answer = await operator.post("/tenants", token=token, **TENANT)
        assert answer.status_code == 403 and "out of date" in answer.text
    async with session_factory.begin() as session:
        assert await session.scalar(select(func.count()).select_from(Tenant)) == 0


@pytest.mark.parametrize("cookie", ["", "operator.me", "operator.me.x.y", "ü", "a" * 5000])
def test_a_forged_cookie_is_no_session(settings: Settings, cookie: str) -> None:
    assert Gate(settings).open(cookie) is None


def test_a_session_ends_with_its_time_its_password_and_its_secret(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(settings)
    session = new_session(is_operator=True)
    cookie = gate.seal(session)
    assert gate.open(cookie) == session
    for name in ("admin_password", "session_secret"):
        assert Gate(Settings(**{**dict(settings), name: "another"})).open(cookie) is None
    monkeypatch.setattr(auth, "SESSION_TTL_S", -1)
    assert gate.open(cookie) is None


async def test_signing_out_ends_the_session_itself(operator: Operator) -> None:
    await operator.sign_in()
    cookie = operator.client.cookies[COOKIE]
    answer = await operator.post("/logout")
    assert answer.headers["location"] == "/admin/login"
    assert COOKIE not in operator.client.cookies
    operator.client.cookies.set(COOKIE, cookie, domain="store.local", path="/admin")
    assert (await operator.get("/")).status_code == 303


@pytest.mark.parametrize(
    "wanted",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil",
        "/admin//evil.example",
        "/admin/\n",
        "/v1",
        "javascript:1",
    ],
)
async def test_the_login_leads_nowhere_else(operator: Operator, wanted: str) -> None:
    assert (await operator.sign_in(wanted=wanted)).headers["location"] == "/admin/"


async def test_browsers_are_told_to_keep_pages_safe(operator: Operator) -> None:
    stranger = await operator.get("/jobs")
    await operator.sign_in()
    for answer in (stranger, await operator.get("/"), await operator.get("/nope")):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';") and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
    style = await operator.get("/static/console.css")
    assert style.status_code == 200 and "max-age" in style.headers["cache-control"]
    assert (await operator.get("/static/../auth.py")).status_code in (303, 404)
    for path in ("/static/%2e%2e/auth.py", "/static%2f../jobs", "/static//etc/passwd", "/static/"):
        assert (await operator.get(path)).status_code == 404, path


async def test_pages_carry_no_script_or_style_of_their_own(operator: Operator) -> None:
    await operator.sign_in()
    for path in ("/", "/engine", "/jobs", "/adapters", "/tenants", "/audit"):
        text = await operator.read(path)
        assert "<style" not in text and " style=" not in text and " onclick" not in text
        assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
        assert text.count("<script ") == text.count("<script src=") == text.count("></script>")
