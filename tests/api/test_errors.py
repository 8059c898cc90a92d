"""Whatever goes wrong, the client gets four words of it: message, type, param, code."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.api.deps import check_body
from services.api.schemas.chat import ChatRequest
from shared.errors import InvalidRequestError
from tests.api.conftest import Api, ServerThread, error_of, free_port
from tests.stub_worker import StubWorker

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "tiny", "messages": MESSAGES}


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
