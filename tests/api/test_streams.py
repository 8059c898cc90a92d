"""Streams under bad weather: clients that leave or do not read, workers that die, requests that fail."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from itertools import pairwise

import openai
import psycopg
import pytest

from shared.messages import TierAttainment
from shared.queue import open_redis
from tests.api.conftest import TEXT, Api
from tests.stub_worker import StubWorker

MESSAGES = [{"role": "user", "content": "hi"}]
MakeWorker = Callable[..., StubWorker]


def eventually(holds: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def num_entries(api: Api) -> int:
    with open_redis(api.settings.redis_url) as server:
        return sum(server.xlen(f"fx:{{inf}}:q:{lane}") for lane in ("hi", "std", "batch"))


def billed(api: Api) -> list[int]:
    """Completion tokens of each usage record."""
    with psycopg.connect(api.settings.database_url.replace("+psycopg", ""), options="-c app.tenant=*") as db:
        return [row[0] for row in db.execute("SELECT completion_tokens FROM usage_record").fetchall()]


def open_stream(api: Api, body: dict[str, object]) -> socket.socket:
    """A client that speaks HTTP by hand, so that it can leave as it likes."""
    content = json.dumps({"model": "tiny", "messages": MESSAGES} | body).encode()
    connection = socket.create_connection(("127.0.0.1", api.settings.api_port), timeout=10)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + f"Authorization: Bearer {api.key()}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}])
def test_a_client_that_leaves_frees_its_requests(idle_api: Api, make_worker: MakeWorker, body: dict) -> None:
    with make_worker(step_s=0.05) as worker:
        idle_api.say = TEXT * 20
        connection = open_stream(idle_api, body)
        assert eventually(lambda: len(worker.running) == body.get("n", 1))
        connection.close()
        assert eventually(lambda: not worker.running and num_entries(idle_api) == 0)
    assert len(worker.results) < 100


def test_a_client_that_leaves_before_a_worker_came_leaves_nothing(
    idle_api: Api, make_worker: MakeWorker
) -> None:
    make_worker().beat()
    connection = open_stream(idle_api, {"stream": True})
    assert eventually(lambda: num_entries(idle_api) == 1)
    connection.close()
    assert eventually(lambda: num_entries(idle_api) == 0)


def test_what_was_delivered_to_a_client_that_left_is_billed(idle_api: Api, make_worker: MakeWorker) -> None:
    with make_worker(step_s=0.05):
        idle_api.say = TEXT * 20
        connection = open_stream(idle_api, {"stream": True})
        while b"content" not in connection.recv(65536):
            pass
        connection.close()
        assert eventually(lambda: len(billed(idle_api)) == 1)
    assert 0 < billed(idle_api)[0] < len(idle_api.tokenizer.encode(TEXT * 20))


def test_a_stop_string_frees_the_request_before_the_worker_is_done(
    idle_api: Api, make_worker: MakeWorker
) -> None:
    with make_worker(step_s=0.02) as worker:
        idle_api.say = TEXT * 20
        answer = idle_api.openai().chat.completions.create(model="tiny", messages=MESSAGES, stop=" fox")
        assert answer.choices[0].message.content == "The quick brown"
        assert eventually(lambda: not worker.running)
    assert len(worker.results) < 40
    assert answer.usage.completion_tokens < 20


def test_tokens_reach_the_client_as_they_are_made(idle_api: Api, make_worker: MakeWorker) -> None:
    with make_worker(step_s=0.05):
        idle_api.say = TEXT
        stream = idle_api.openai().chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        times = [time.monotonic() for chunk in stream if chunk.choices[0].delta.content]
        gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) > 10
    assert sorted(gaps)[len(gaps) // 2] > 0.03  # not in one burst at the end


def test_a_stream_survives_the_death_of_its_worker(idle_api: Api, make_worker: MakeWorker) -> None:
    idle_api.say = TEXT * 3
    with make_worker("dying", step_s=0.02):
        stream = idle_api.openai().chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        text = "".join(next(stream).choices[0].delta.content or "" for _ in range(10))
    assert 0 < len(text) < len(TEXT)
    with make_worker("next"):
        text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == TEXT * 3


def test_what_fails_before_the_first_token_has_a_status(idle_api: Api, make_worker: MakeWorker) -> None:
    with make_worker(fail_with="adapter_load_failed"), pytest.raises(openai.InternalServerError) as caught:
        idle_api.openai().chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert (caught.value.status_code, caught.value.code) == (503, "adapter_load_failed")
    assert billed(idle_api) == []


@pytest.mark.parametrize(
    ("code", "status", "retried"),
    [("poisoned", 500, "false"), ("deadline_exceeded", 504, "false"), ("x", 500, "false")],
)
def test_failures_that_would_repeat_are_not_retried(
    idle_api: Api, make_worker: MakeWorker, code: str, status: int, retried: str
) -> None:
    with make_worker(fail_with=code), pytest.raises(openai.InternalServerError) as caught:
        idle_api.openai().chat.completions.create(model="tiny", messages=MESSAGES)
    assert caught.value.status_code == status
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_failure_in_mid_stream_raises_in_the_official_client(
    idle_api: Api, make_worker: MakeWorker
) -> None:
    with make_worker(fail_with="poisoned", fail_after=5):
        stream = idle_api.openai().chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        pieces = []
        with pytest.raises(openai.APIError) as caught:
            pieces.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert caught.value.code == "request_poisoned"


def test_a_request_that_no_worker_takes_is_refused_in_time(idle_api: Api, make_worker: MakeWorker) -> None:
    make_worker().beat()
    with open_redis(idle_api.settings.redis_url) as server:
        connection = open_stream(idle_api, {"stream": True})
        assert eventually(lambda: num_entries(idle_api) == 1)
        [key] = server.keys("fx:{inf}:req:*")
        server.hset(key, "start_by_ms", 0)
        status = connection.makefile("rb").readline()
    assert status.split()[1] == b"503"
    assert num_entries(idle_api) == 0


def test_readiness_says_what_is_missing(idle_api: Api, make_worker: MakeWorker) -> None:
    with idle_api.http(org=None) as http:
        assert http.get("/livez").status_code == 200
        response = http.get("/readyz")
        assert (response.status_code, response.json()["problems"]) == (503, {"workers": "none has reported"})
        make_worker().beat()
        assert eventually(lambda: http.get("/readyz").status_code == 200)
        assert "flexllm_requests_total" in http.get("/metrics").text


def test_figures_count_what_was_served(api: Api) -> None:
    api.openai().chat.completions.create(model="tiny", messages=MESSAGES)
    with api.http(org=None) as http:
        lines = dict(
            line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if not line.startswith("#")
        )
    num_text = len(api.tokenizer.encode(TEXT))
    assert float(lines["flexllm_completion_tokens_total"]) == num_text
    assert float(lines["flexllm_sequences_in_flight"]) == 0
    route = '{method="POST",route="/v1/chat/completions",status="200"}'
    assert float(lines[f"flexllm_requests_total{route}"]) == 1


def test_the_memory_of_workers_is_told_by_owner(idle_api: Api, make_worker: MakeWorker) -> None:
    worker = make_worker()
    with idle_api.http(org=None) as http:
        assert "flexllm_memory_bytes{" not in http.get("/metrics").text
        worker.memory_bytes = {"weights": 300, "activations": 40}
        worker.beat()
        name = f'worker="{worker.worker_id}"'
        wanted = {
            f'flexllm_memory_bytes{{owner="weights",place="device",{name}}} 300.0',
            f'flexllm_memory_bytes{{owner="activations",place="device",{name}}} 40.0',
            f"flexllm_memory_limit_bytes{{{name}}} 1000.0",
        }
        assert eventually(lambda: wanted <= set(http.get("/metrics").text.splitlines()))


def test_figures_of_requests_are_told_by_tier(api: Api) -> None:
    client = api.openai()
    for tier in ("flex", "flex", "priority"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, service_tier=tier)
    with api.http(org=None) as http:
        lines = set(http.get("/metrics").text.splitlines())
    for tier, count in {"flex": 2.0, "priority": 1.0}.items():
        for name in ("inference_requests_total", "time_to_first_token_seconds_count"):
            assert f'flexllm_{name}{{tier="{tier}"}} {count}' in lines


def test_what_workers_say_of_their_service_levels_is_counted(idle_api: Api, make_worker: MakeWorker) -> None:
    worker = make_worker()
    with idle_api.http(org=None) as http:
        assert "flexllm_slo_requests_total{" not in http.get("/metrics").text
        worker.service_levels = {"flex": TierAttainment(ttft_met=3, ttft_missed=1, tpot_met=2)}
        worker.beat()
        labels = f'target="{{}}",tier="flex",worker="{worker.worker_id}"'
        wanted = {
            f'flexllm_slo_requests_total{{outcome="{outcome}",{labels.format(target)}}} {count}'
            for target, outcome, count in [
                ("ttft", "met", 3.0),
                ("ttft", "missed", 1.0),
                ("tpot", "met", 2.0),
                ("tpot", "missed", 0.0),
            ]
        }
        assert eventually(lambda: wanted <= set(http.get("/metrics").text.splitlines()))


def test_no_prompt_and_no_key_is_logged(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "tell-nobody-4711"
    api.openai().chat.completions.create(model="tiny", messages=[{"role": "user", "content": secret}])
    with api.http() as http:
        http.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": secret}]})
    out = "".join(capsys.readouterr())
    assert "/v1/chat/completions" in out
    for word in (secret, TEXT, api.key()):
        assert word not in out
