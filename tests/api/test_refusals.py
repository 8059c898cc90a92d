"""What nobody gets to change anything with: no key, another's scope, broken bodies, values out of bounds."""

from __future__ import annotations

import json
import socket

import openai
import pytest

from services.api.main import ROUTERS
from tests.api.conftest import Api, error_of

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "tiny", "messages": MESSAGES}
PATHS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("DELETE", "/v1/models/tiny"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/file-x"),
    ("GET", "/v1/files/file-x/content"),
    ("DELETE", "/v1/files/file-x"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/ftjob-x"),
    ("POST", "/v1/fine_tuning/jobs/ftjob-x/cancel"),
    ("POST", "/v1/fine_tuning/jobs/ftjob-x/pause"),
    ("POST", "/v1/fine_tuning/jobs/ftjob-x/resume"),
    ("GET", "/v1/fine_tuning/jobs/ftjob-x/events"),
    ("GET", "/v1/fine_tuning/jobs/ftjob-x/checkpoints"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
]


@pytest.fixture
def idle_api(shared_api: Api) -> Api:
    return shared_api


def test_the_walk_covers_every_route(idle_api: Api) -> None:
    known = {
        (
            method,
            route.path.replace("{model:path}", "tiny")
            .replace("{file_id}", "file-x")
            .replace("{job_id}", "ftjob-x"),
        )
        for part in ROUTERS
        for route in part.router.routes
        for method in route.methods
    }
    public = {(method, path) for method in ("GET", "HEAD") for path in ("/livez", "/readyz", "/metrics")}
    assert known == {*PATHS, *public}


def test_every_route_wants_a_key(idle_api: Api) -> None:
    with idle_api.http(org=None) as http:
        for method, path in PATHS:
            error = error_of(http.request(method, path))
            assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
            assert http.request(method, path).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1/../admin",
        "/v1/models/",
        "/docs",
        "/openapi.json",
        "/livez/",
        "/%2e%2e/metrics",
        "/LIVEZ",
    ],
)
def test_no_spelling_of_a_path_passes_without_a_key(idle_api: Api, path: str) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "POST", "TRACE"):
        status = raw_request(idle_api, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert status in (401, 400), (method, path, status)
    assert raw_request(idle_api, "POST /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") == 401


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer sk-flexllm-000000000000-" + "A" * 43,
        "Bearer " + "A" * 10_000,
        "Bearer \xe9",
    ],
)
def test_no_other_key_passes(idle_api: Api, value: str) -> None:
    header = value.format(key=idle_api.key()).encode("latin-1")
    with idle_api.http(org=None) as http:
        response = http.get("/v1/models", headers={"authorization": header})
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert http.get("/v1/models", params={"api_key": idle_api.key()}).status_code == 401


def test_a_key_does_only_what_its_scopes_say(idle_api: Api) -> None:
    infer = {"authorization": f"Bearer {idle_api.key(scopes=('infer',))}"}
    train = {"authorization": f"Bearer {idle_api.key(scopes=('train',))}"}
    with idle_api.http(org=None) as http:
        for path in ("/v1/fine_tuning/jobs", "/v1/files"):
            assert error_of(http.post(path, headers=infer))["type"] == "insufficient_permissions"
        assert http.post("/v1/chat/completions", headers=train, json=CHAT).status_code == 403
        assert http.get("/v1/models", headers=infer).status_code == 200


def test_unknown_routes_and_methods_have_the_same_shape(idle_api: Api) -> None:
    with idle_api.http() as http:
        assert error_of(http.get("/v1/nothing"))["code"] == "unknown_url"
        assert error_of(http.post("/v1/embeddings", json={}))["code"] == "unknown_url"
        assert error_of(http.get("/v1/models/../%00"))["code"]
        response = http.delete("/v1/chat/completions")
        assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
        assert http.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b'{"a":1,}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b"[" * 200 + b"]" * 200, 400, "invalid_value"),
        (b'{"temperature": NaN}', 400, "invalid_json"),
        (b'{"model": "\xff"}', 400, "invalid_json"),
        (b'{"model": "\\ud800"}', 400, "invalid_json"),
        (b'"text"', 400, "invalid_json"),
        (b"null", 400, "invalid_json"),
        (b'{"temperature": ' + b"9" * 5_000_000 + b"}", 413, "request_too_large"),
    ],
)
def test_broken_bodies_are_refused(idle_api: Api, content: bytes, status: int, code: str) -> None:
    with idle_api.http() as http:
        headers = {"content-type": "application/json"}
        for path in ("/v1/chat/completions", "/v1/fine_tuning/jobs"):
            response = http.post(path, content=content, headers=headers)
            assert response.status_code == status
            assert error_of(response)["code"] == code


def test_bodies_of_another_kind_are_refused(idle_api: Api) -> None:
    with idle_api.http() as http:
        content = json.dumps(CHAT).encode()
        for headers in ({"content-type": "text/plain"}, {"content-encoding": "gzip"}):
            response = http.post("/v1/chat/completions", content=content, headers=headers)
            assert response.status_code == 415
            error_of(response)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "{{ 1 }}"),
        ("chat_template_kwargs", {}),
        ("guided_regex", "a"),
        ("lora_path", "/etc"),
        ("prompt_embeds", "x"),
        ("cache_salt", "x"),
        ("logits_processors", []),
        ("tenant_id", "x"),
    ],
)
def test_fields_that_we_do_not_know_are_named(idle_api: Api, field: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        idle_api.openai().chat.completions.create(**CHAT, extra_body={field: value})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", field)
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("tool_choice", "required"),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("modalities", ["audio"]),
        ("web_search_options", {}),
        ("n", 9),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", [""]),
        ("stop", "x" * 129),
        ("stop_token_ids", [384]),
        ("stop_token_ids", list(range(65))),
        ("logit_bias", {"384": 1}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {str(i): 1 for i in range(301)}),
        ("top_k", 385),
        ("top_logprobs", 3),
        ("max_tokens", 0),
        ("user", "x" * 257),
        ("metadata", {str(i): "x" for i in range(17)}),
        ("messages", []),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "wizard", "content": "x"}]),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
        ),
        ("messages", [{"role": "user", "content": "x"}] * 1025),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(api: Api, field: str, value: object) -> None:
    with api.http() as http:
        response = http.post("/v1/chat/completions", json=CHAT | {field: value})
    assert response.status_code == 400
    error = error_of(response)
    assert field in (error["param"] or error["message"])
    assert api.requests == []


def raw_request(api: Api, text: str) -> int:
    with socket.create_connection(("127.0.0.1", api.settings.api_port), timeout=10) as connection:
        connection.sendall(text.encode())
        return int(connection.makefile("rb").readline().split()[1])
