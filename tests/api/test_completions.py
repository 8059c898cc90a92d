"""The older completions: raw prompts, several at once, echoes, and scoring."""

from __future__ import annotations

import openai
import pytest

from tests.api.conftest import TEXT, Api


def test_a_prompt_of_text_or_token_ids_is_continued(api: Api) -> None:
    client, tokens = api.openai(), api.tokenizer.encode("Once upon")
    for prompt in ("Once upon", tokens):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=400)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
        assert list(api.requests[-1].prompt) == tokens
    assert answer.id.startswith("cmpl-")


def test_the_default_is_sixteen_tokens(api: Api) -> None:
    answer = api.openai().completions.create(model="tiny", prompt="x")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


def test_choices_come_prompt_by_prompt(api: Api) -> None:
    prompts = ["one", "two", "three"]
    answer = api.openai().completions.create(model="tiny", prompt=prompts, n=2, max_tokens=400, echo=True)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [p + TEXT for p in prompts for _ in range(2)]
    assert answer.usage.prompt_tokens == sum(len(api.tokenizer.encode(p)) for p in prompts)


def test_token_id_prompts_come_in_lists_too(api: Api) -> None:
    answer = api.openai().completions.create(model="tiny", prompt=[[5, 6], [7]], max_tokens=1)
    assert len(answer.choices) == 2
    assert {request.prompt for request in api.requests} == {(5, 6), (7,)}


def test_control_tokens_in_a_raw_prompt_count(api: Api) -> None:
    api.openai().completions.create(model="tiny", prompt="<|im_start|>user\nhi<|im_end|>")
    assert api.requests[0].prompt[0] == 1
    assert api.requests[0].prompt[-1] == 2


def test_an_empty_prompt_starts_a_text(api: Api) -> None:
    assert api.openai().completions.create(model="tiny", prompt="", max_tokens=400).choices[0].text == TEXT


def test_a_stream_is_the_same_text(api: Api) -> None:
    stream = api.openai().completions.create(
        model="tiny",
        prompt="Say: ",
        max_tokens=400,
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, usage = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Say: " + TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert usage.usage.total_tokens == len(api.requests[0].prompt) + len(api.tokenizer.encode(TEXT))


@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs_are_parallel_lists_over_the_text(api: Api, is_stream: bool) -> None:
    options = {"model": "tiny", "prompt": "ab", "max_tokens": 4, "logprobs": 2}
    if is_stream:
        parts = [
            chunk.choices[0].logprobs for chunk in api.openai().completions.create(**options, stream=True)
        ]
        tokens = [token for part in parts for token in part.tokens]
        offsets = [offset for part in parts for offset in part.text_offset]
    else:
        [choice] = api.openai().completions.create(**options).choices
        tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
        assert choice.logprobs.token_logprobs == [-0.5] * 4
        assert all(
            max(top.values()) == top[t] for t, top in zip(tokens, choice.logprobs.top_logprobs, strict=True)
        )
    assert TEXT.startswith("".join(tokens))
    assert offsets == [len("".join(tokens[:i])) for i in range(4)]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_text_is_scored_without_generating_anything(api: Api, is_stream: bool) -> None:
    """As lm-eval-harness asks: echo, logprobs, no new token."""
    text = "The fox is naïve."
    options = {"model": "tiny", "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
    if is_stream:
        [chunk] = list(api.openai().completions.create(**options, stream=True))
        [choice] = chunk.choices
    else:
        answer = api.openai().completions.create(**options)
        assert answer.usage.completion_tokens == 0
        [choice] = answer.choices
    assert choice.text == text
    assert choice.finish_reason == "length"
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == [-0.5] * (len(api.tokenizer.encode(text)) - 1)
    assert choice.logprobs.text_offset[0] == 0
    assert api.requests[0].sampling.prompt_logprobs == 1


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": [400]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 17}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x", "logprobs": 6}, "logprobs"),
        ({"prompt": "x", "best_of": 2}, None),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 512}, None),
    ],
)
def test_what_cannot_be_done_is_refused(api: Api, options: dict[str, object], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.openai().completions.create(model="tiny", **options)
    if param is not None:
        assert caught.value.param.startswith(param)
    assert api.requests == []
