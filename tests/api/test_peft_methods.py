"""Choosing a PEFT method for a finetuning job."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from services.api.training import LEARNING_RATES
from shared.config import Settings
from shared.messages import TrainSpec
from shared.peft import (
    LINEAR_TARGETS,
    BottleneckSpec,
    Ia3Spec,
    LoraSpec,
    PeftSpec,
    PrefixSpec,
    PromptSpec,
)
from tests.api.conftest import Api
from tests.api.test_fine_tuning import row
from tests.api.test_tenants import publish_adapter

MAX_TRAIN_LEN = 512


@pytest.fixture
def api_settings(api_settings: Settings) -> Settings:
    return api_settings.model_copy(update={"finetune_tokens_in_flight": MAX_TRAIN_LEN})


def create(api: Api, file_id: str, **extension: Any) -> tuple[TrainSpec, dict[str, Any]]:
    """The spec that the job's row holds, and `flexllm` as the client gets it back."""
    job = api.openai().fine_tuning.jobs.create(
        model="tiny", training_file=file_id, extra_body={"flexllm": extension}
    )
    return TrainSpec.model_validate(row(api, job.id, "spec")), job.flexllm


CASES: list[tuple[dict[str, Any], PeftSpec]] = [
    ({}, LoraSpec()),
    ({"rank": 4}, LoraSpec(rank=4, alpha=8)),
    ({"type": "lora", "use_rslora": True, "rank": 64}, LoraSpec(rank=64, alpha=8, use_rslora=True)),
    ({"type": "lora", "use_rslora": True, "alpha": 16}, LoraSpec(alpha=16, use_rslora=True)),
    ({"type": "lora", "use_dora": True}, LoraSpec(use_dora=True)),
    ({"target_modules": "all-linear"}, LoraSpec(target_modules=LINEAR_TARGETS)),
    (
        {"target_modules": ["lm_head", "q_proj", "embed_tokens"]},
        LoraSpec(target_modules=("q_proj", "embed_tokens", "lm_head")),
    ),
    ({"type": "ia3"}, Ia3Spec()),
    (
        {"type": "ia3", "target_modules": ["v_proj", "k_proj"]},
        Ia3Spec(target_modules=("k_proj", "v_proj"), feedforward_modules=()),
    ),
    (
        {"type": "ia3", "target_modules": ["o_proj"], "feedforward_modules": ["o_proj"]},
        Ia3Spec(target_modules=("o_proj",), feedforward_modules=("o_proj",)),
    ),
    ({"type": "bottleneck"}, BottleneckSpec()),
    (
        {"type": "bottleneck", "size": 8, "activation": "gelu", "scaling": 4, "parallel": True},
        BottleneckSpec(size=8, activation="gelu", scaling=4.0, parallel=True),
    ),
    ({"type": "prefix_tuning"}, PrefixSpec()),
    ({"type": "prompt_tuning", "num_virtual_tokens": 8}, PromptSpec(num_virtual_tokens=8)),
]


def test_each_method_is_chosen_with_its_own_fields(idle_api: Api, file_id: str) -> None:
    for asked, expected in CASES:
        spec, answer = create(idle_api, file_id, peft=asked)
        assert spec.peft == expected, asked
        assert answer["peft"] == expected.model_dump(mode="json"), asked


def test_the_learning_rate_is_the_methods_unless_it_is_named(idle_api: Api, file_id: str) -> None:
    for kind, rate in LEARNING_RATES.items():
        spec, answer = create(idle_api, file_id, peft={"type": kind})
        assert spec.learning_rate == answer["learning_rate"] == rate
    assert create(idle_api, file_id)[0].learning_rate == LEARNING_RATES["lora"]
    named, _ = create(idle_api, file_id, peft={"type": "ia3"}, learning_rate=0.5)
    assert named.learning_rate == 0.5


def test_the_multiplier_is_of_the_methods_learning_rate(idle_api: Api, file_id: str) -> None:
    job = idle_api.openai().fine_tuning.jobs.create(
        model="tiny",
        training_file=file_id,
        hyperparameters={"learning_rate_multiplier": 0.5},
        extra_body={"flexllm": {"peft": {"type": "prompt_tuning"}}},
    )
    assert job.flexllm["learning_rate"] == LEARNING_RATES["prompt_tuning"] / 2


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning"])
def test_virtual_tokens_take_positions_from_the_examples(idle_api: Api, file_id: str, kind: str) -> None:
    peft: dict[str, Any] = {"type": kind, "num_virtual_tokens": 100}
    left = MAX_TRAIN_LEN - 100
    assert create(idle_api, file_id, peft=peft)[0].max_seq_len == left
    assert create(idle_api, file_id, peft=peft, max_seq_len=left)[0].max_seq_len == left
    assert create(idle_api, file_id)[0].max_seq_len == MAX_TRAIN_LEN
    error = refuse(idle_api, file_id, peft=peft, max_seq_len=left + 1)
    assert error["param"] == "flexllm.max_seq_len"
    assert f"{left} tokens beside 100 virtual ones" in error["message"]
    error = refuse(idle_api, file_id, peft={"type": kind, "num_virtual_tokens": MAX_TRAIN_LEN - 7})
    assert error["param"] == "flexllm.peft.num_virtual_tokens"


def refuse(api: Api, file_id: str, **extension: Any) -> dict[str, Any]:
    """The error of a job that is refused."""
    with api.http() as http:
        body = {"model": "tiny", "training_file": file_id, "flexllm": extension}
        response = http.post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return dict(error)


def test_an_adapters_virtual_tokens_leave_less_context_to_its_requests(api: Api) -> None:
    publish_adapter(api, TrainSpec(peft=PromptSpec(num_virtual_tokens=100)))
    client, longest = api.openai(), api.settings.max_model_len
    for model, fits in (("tiny", longest), ("acme/bot", longest - 100)):
        client.completions.create(model=model, prompt=[1] * (fits - 4), max_tokens=4)
        with pytest.raises(openai.BadRequestError, match=f"context length is {fits} tokens") as caught:
            client.completions.create(model=model, prompt=[1] * (fits - 3), max_tokens=4)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match=f"context length is {fits} tokens"):
            client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=fits
            )
    base, adapted = api.requests
    assert base.adapter is None
    assert adapted.adapter is not None and adapted.adapter.num_virtual_tokens == 100


REFUSED: list[tuple[Any, str, str]] = [
    ({"type": "dora"}, "type", "'bottleneck', 'prefix_tuning', 'prompt_tuning'"),
    ({"type": None}, "type", "'lora'"),
    ({"type": ["lora"]}, "type", "'lora'"),
    ({"use_dora": True, "dropout": 0.1}, "dropout", "without dropout"),
    ({"dropout": 0.1, "use_dora": True, "rank": 4}, "dropout", "without dropout"),
    ({"use_dora": True, "target_modules": ["lm_head"]}, "target_modules", "use_dora is not for"),
    ({"target_modules": ["q_proj", "q_proj"]}, "target_modules", "named twice"),
    ({"lora": 1}, "lora", "Unrecognized"),
    ({"type": "ia3", "rank": 8}, "rank", "Unrecognized"),
    ({"type": "ia3", "target_modules": "all-linear"}, "target_modules", "list"),
    ({"type": "ia3", "target_modules": ["lm_head"]}, "target_modules.0", "'q_proj'"),
    ({"type": "ia3", "target_modules": ["k_proj", "k_proj"]}, "target_modules", "named twice"),
    ({"type": "ia3", "feedforward_modules": ["o_proj"]}, "feedforward_modules", "o_proj is not among"),
    ({"type": "ia3", "feedforward_modules": ["k_proj"]}, "feedforward_modules.0", "'o_proj'"),
    ({"type": "bottleneck", "size": 0}, "size", "greater than or equal to 1"),
    ({"type": "bottleneck", "activation": "swish"}, "activation", "'silu'"),
    ({"type": "bottleneck", "scaling": 0}, "scaling", "greater than 0"),
    ({"type": "bottleneck", "parallel": 1}, "parallel", "boolean"),
    ({"type": "prefix_tuning", "num_virtual_tokens": 513}, "num_virtual_tokens", "512"),
    ({"type": "prompt_tuning", "size": 8}, "size", "Unrecognized"),
    ("lora", "", "object"),
]


def test_what_does_not_fit_the_method_is_named(idle_api: Api, file_id: str) -> None:
    for peft, field, words in REFUSED:
        error = refuse(idle_api, file_id, peft=peft)
        assert error["param"] == f"flexllm.peft.{field}".rstrip("."), error
        assert words in error["message"], error


def test_the_largest_rank_is_asked_of_lora_alone(idle_api: Api, file_id: str) -> None:
    limit = idle_api.settings.max_lora_rank
    assert refuse(idle_api, file_id, peft={"rank": limit + 1})["param"] == "flexllm.peft.rank"
    spec, _ = create(idle_api, file_id, peft={"type": "bottleneck", "size": 8 * limit})
    assert spec.peft == BottleneckSpec(size=8 * limit)
