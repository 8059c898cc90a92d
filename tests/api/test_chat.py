"""Chat completions with the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.api.conftest import TEXT, Api

MESSAGES = [{"role": "user", "content": "Say something."}]


def test_a_completion_comes_back_whole(api: Api) -> None:
    answer = api.openai().chat.completions.create(model="tiny", messages=MESSAGES)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(api.tokenizer.encode_chat(MESSAGES))
    assert answer.usage.completion_tokens == len(api.tokenizer.encode(TEXT))
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    assert answer._request_id
    [request] = api.requests
    assert list(request.prompt) == api.tokenizer.encode_chat(MESSAGES)
    assert request.sampling.max_tokens == 512 - len(request.prompt)
    assert request.cache_salt


def test_a_stream_brings_the_role_the_text_the_reason_and_the_usage_in_order(api: Api) -> None:
    stream = api.openai().chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    first, *rest, last, usage = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content for chunk in rest) == TEXT
    assert len(rest) > 5
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(api.tokenizer.encode(TEXT))
    assert {chunk.id for chunk in [first, *rest, last, usage]} == {first.id}
    assert all(chunk.usage is None for chunk in [first, *rest, last])


def test_the_wire_is_server_sent_events_that_end_with_done(api: Api) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "stream": True}
    with api.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    *events, done, empty = text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in events)
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


@pytest.mark.parametrize("is_stream", [False, True])
def test_characters_of_several_tokens_arrive_whole(api: Api, is_stream: bool) -> None:
    api.say = "Größe 東京 🙂👩‍👩‍👧 é \u0301 naïve 🇩🇪"
    client = api.openai()
    if is_stream:
        chunks = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == api.say
    else:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert answer.choices[0].message.content == api.say


def test_text_cut_within_a_character_ends_in_a_replacement_character(api: Api) -> None:
    api.say = "🙂"
    answer = api.openai().chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
    assert answer.choices[0].message.content == "\ufffd"
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("jumps over", "The quick brown fox "), (["zzz", "q"], "The "), ("dog.", TEXT[:-4])],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_stop_strings_end_the_text_before_them(
    api: Api, stop: object, expected: str, is_stream: bool
) -> None:
    client = api.openai()
    if is_stream:
        chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stop=stop, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        [choice] = client.chat.completions.create(model="tiny", messages=MESSAGES, stop=stop).choices
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == (expected, "stop")


def test_what_only_looks_like_a_stop_string_is_given_out_at_the_end(api: Api) -> None:
    answer = api.openai().chat.completions.create(model="tiny", messages=MESSAGES, stop="dog.?")
    assert answer.choices[0].message.content == TEXT


def test_several_choices_have_seeds_of_their_own_and_count_their_prompt_once(api: Api) -> None:
    answer = api.openai().chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == [TEXT] * 3
    assert [request.sampling.seed for request in api.requests] == [7, 8, 9]
    assert answer.usage.prompt_tokens == len(api.requests[0].prompt)
    assert answer.usage.completion_tokens == 3 * len(api.tokenizer.encode(TEXT))
    chunks = list(api.openai().chat.completions.create(model="tiny", messages=MESSAGES, n=2, stream=True))
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == TEXT
        assert own[-1].finish_reason == "stop"


@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs_name_each_token_and_its_alternatives(api: Api, is_stream: bool) -> None:
    api.say = "Größe"
    options = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    if is_stream:
        chunks = api.openai().chat.completions.create(**options, stream=True)
        content = [
            entry
            for chunk in chunks
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content
        ]
    else:
        content = api.openai().chat.completions.create(**options).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content) == "Größe".encode()
    assert all(entry.logprob == -0.5 for entry in content)
    assert [[top.logprob for top in entry.top_logprobs] for entry in content] == [[-0.5, -1.5]] * len(content)
    assert content[0].top_logprobs[0].token == content[0].token


def test_every_sampling_field_reaches_the_worker(api: Api) -> None:
    api.openai().chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0.5,
        top_p=0.25,
        frequency_penalty=1,
        presence_penalty=-1.5,
        logit_bias={"5": 10, "6": -100},
        seed=-1,
        max_completion_tokens=9,
        max_tokens=99,
        service_tier="priority",
        extra_body={
            "top_k": 3,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "ignore_eos": True,
            "stop_token_ids": [4],
        },
    )
    [request] = api.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 3, 0.125)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (1.0, -1.5)
    assert (sampling.repetition_penalty, sampling.ignore_eos) == (1.5, True)
    assert sampling.logit_bias == {5: 10.0, 6: -100.0}
    assert (sampling.stop_token_ids, sampling.max_tokens, sampling.seed) == ((4,), 9, 2**63 - 1)
    assert request.service_tier == "priority"


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        (openai.omit, "default"),
        (None, "default"),
        ("auto", "default"),
        ("default", "default"),
        ("scale", "default"),
        ("flex", "flex"),
        ("priority", "priority"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_names_the_tier_that_served_it(api: Api, asked: Any, used: str, stream: bool) -> None:
    client = api.openai()
    chat: Any = client.chat.completions.create(
        model="tiny", messages=MESSAGES, service_tier=asked, stream=stream
    )
    body = {} if asked is openai.omit else {"service_tier": asked}
    text: Any = client.completions.create(model="tiny", prompt="hi", stream=stream, extra_body=body)
    for answer in (chat, text):
        parts = list(answer) if stream else [answer]
        assert {part.service_tier for part in parts} == {used}
    assert [request.service_tier for request in api.requests] == [used, used]


@pytest.mark.parametrize("wrong", ["Priority", "batch", "", 1, ["flex"]])
def test_an_unknown_tier_is_refused_by_the_fields_name(api: Api, wrong: Any) -> None:
    client = api.openai()
    for ask in (
        lambda: client.chat.completions.create(model="tiny", messages=MESSAGES, service_tier=wrong),
        lambda: client.completions.create(model="tiny", prompt="hi", extra_body={"service_tier": wrong}),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        assert (caught.value.param, caught.value.type) == ("service_tier", "invalid_request_error")
        assert "'priority'" in caught.value.message
    assert api.requests == []


def test_fields_of_the_official_schema_without_a_meaning_here_are_accepted(api: Api) -> None:
    answer = api.openai().chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "ok", "refusal": None, "annotations": []},
            {"role": "user", "content": "c", "name": "Ada"},
        ],
        user="u",
        store=False,
        metadata={"a": "b"},
        reasoning_effort="low",
        verbosity="low",
        prompt_cache_key="k",
        safety_identifier="s",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        service_tier="auto",
        modalities=["text"],
        stream_options=None,
        prediction={"type": "content", "content": "x"},
    )
    assert answer.service_tier == "default"
    assert api.tokenizer.decode(list(api.requests[0].prompt)).count("ab") == 1


def test_a_prompt_and_its_completion_must_fit_the_context(api: Api) -> None:
    client = api.openai()
    num_prompt = len(api.tokenizer.encode_chat(MESSAGES))
    client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=512 - num_prompt)
    for options in (
        {"messages": MESSAGES, "max_tokens": 513 - num_prompt},
        {"messages": [{"role": "user", "content": "word " * 600}]},
        {"messages": [{"role": "user", "content": "a" * 3_000_000}]},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", **options)
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "model", ["other", "acme/none", "ft:tiny:acme:x:12345678", "../tiny", "tiny ", "t\0", "😀", "a" * 200]
)
def test_an_unknown_model_is_not_found_and_never_the_base_model(api: Api, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        api.openai().chat.completions.create(model=model, messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert api.requests == []
