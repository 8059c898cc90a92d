"""Whatever goes wrong, the client gets four words of it: message, type, param, code."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.api.deps import check_body
from services.api.main import ROUTERS
from services.api.schemas.chat import ChatRequest
from shared.errors import InvalidRequestError
from tests.api.conftest import Api, ServerThread, free_port
from tests.stub_worker import StubWorker

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "tiny", "messages": MESSAGES}
EXAMPLES = {"model": "tiny", "file_id": "file-x", "job_id": "ftjob-x"}
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


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"functions": []}, "functions", "not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
            "text",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string; or"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
        ({"stream_options": {"a": 1}}, "stream_options.a", "Unrecognized"),
        ({"metadata": {"k" * 65: "x"}}, "metadata." + "k" * 65, "at most 64"),
    ],
)
def test_errors_name_the_field_and_say_what_it_may_be(change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_body(ChatRequest, CHAT | change)
    assert caught.value.param.startswith(param)
    assert words in caught.value.message


numbers = st.one_of(
    st.sampled_from(
        [-1, 0, 1, 2, 20, 21, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 1e308, -1e308, 0.5, 1.5]
    ),
    st.sampled_from([True, False, "1", "", [], {}, [1], None]),
)
FIELDS = [
    *("temperature", "top_p", "n", "frequency_penalty", "presence_penalty", "seed", "max_tokens", "top_k"),
    *("max_completion_tokens", "top_logprobs", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids"),
    *("logit_bias", "logprobs", "stream_options", "stop"),
]


@given(body=st.dictionaries(st.sampled_from(FIELDS), numbers, min_size=1, max_size=3))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_is_accepted_or_refused_and_never_an_accident(api: Api, body: dict[str, Any]) -> None:
    with api.http() as http:
        response = http.post("/v1/chat/completions", json=CHAT | body | {"stream": False})
    assert response.status_code in (200, 400), (body, response.text)
    if response.status_code == 400:
        error_of(response)
    for field, value in body.items():
        if isinstance(value, bool) and field not in ("ignore_eos", "logprobs"):
            assert response.status_code == 400, body


def test_without_a_worker_nobody_waits(idle_api: Api) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        idle_api.openai().chat.completions.create(**CHAT)
    assert caught.value.status_code == 503
    assert caught.value.code == "no_worker_available"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 5


def test_a_full_queue_says_when_to_come_back(api_settings, make_worker) -> None:
    small = api_settings.model_copy(update={"max_queue_depth": 1, "api_port": free_port()})
    worker: StubWorker = make_worker()
    worker.beat()
    with ServerThread(small):
        api = Api(small, worker.answer.__self__.tokenizer)
        with pytest.raises(openai.InternalServerError) as caught:
            api.openai().chat.completions.create(**CHAT, n=2)
        assert (caught.value.status_code, caught.value.code) == (503, "server_is_overloaded")
        assert caught.value.response.headers["retry-after"]
        time.sleep(0.5)
        assert worker.take() == []  # the choice that found room was taken back


def test_one_tenant_cannot_take_more_than_its_share(api_settings, make_worker) -> None:
    small = api_settings.model_copy(update={"max_sequences_per_tenant": 2, "api_port": free_port()})
    worker: StubWorker = make_worker()
    with ServerThread(small), worker:
        api = Api(small, worker.answer.__self__.tokenizer)
        with pytest.raises(openai.RateLimitError) as caught:
            api.openai().chat.completions.create(**CHAT, n=3)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"]
        assert len(api.openai().chat.completions.create(**CHAT, n=2).choices) == 2
        assert len(api.openai().chat.completions.create(**CHAT, n=2).choices) == 2


def raw_request(api: Api, text: str) -> int:
    with socket.create_connection(("127.0.0.1", api.settings.api_port), timeout=10) as connection:
        connection.sendall(text.encode())
        return int(connection.makefile("rb").readline().split()[1])
