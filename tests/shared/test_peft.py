"""PEFT methods on the wire."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

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

BEFORE_OTHER_METHODS = {  # as rows of that time hold it
    "type": "lora",
    "rank": 8,
    "alpha": 16.0,
    "target_modules": ["q_proj", "v_proj"],
    "dropout": 0.1,
}
METHODS: list[PeftSpec] = [
    LoraSpec(rank=4, alpha=8, use_rslora=True, target_modules=(*LINEAR_TARGETS, "embed_tokens", "lm_head")),
    LoraSpec(use_dora=True),
    Ia3Spec(target_modules=("v_proj", "o_proj"), feedforward_modules=("o_proj",)),
    BottleneckSpec(size=8, activation="silu", scaling=4.0, parallel=True),
    PrefixSpec(num_virtual_tokens=30),
    PromptSpec(num_virtual_tokens=5),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.type)
def test_a_spec_comes_back_as_it_was_sent(method: PeftSpec) -> None:
    spec = TrainSpec(peft=method)
    assert TrainSpec.model_validate_json(spec.model_dump_json()) == spec
    assert TrainSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_a_spec_from_before_there_were_other_methods_is_plain_lora() -> None:
    spec = TrainSpec.model_validate({"peft": BEFORE_OTHER_METHODS})
    assert spec.peft == LoraSpec(rank=8, alpha=16, target_modules=("q_proj", "v_proj"), dropout=0.1)
    assert TrainSpec.model_validate({}).peft == LoraSpec()


def test_only_what_stands_in_front_of_a_sequence_takes_positions() -> None:
    assert [method.num_virtual_tokens for method in METHODS] == [0, 0, 0, 0, 30, 5]


@pytest.mark.parametrize(
    ("peft", "words"),
    [
        ({"type": "adalora"}, "does not match any of the expected tags"),
        ({"type": "lora", "use_dora": True, "dropout": 0.1}, "dropout has to be 0"),
        ({"type": "lora", "use_dora": True, "target_modules": ["q_proj", "lm_head"]}, "use_dora is not for"),
        ({"type": "ia3", "target_modules": ["k_proj"]}, "has to be a target module"),
        ({"type": "ia3", "target_modules": ["k_proj"], "feedforward_modules": ["k_proj"]}, "'down_proj'"),
        ({"type": "bottleneck", "size": 1025}, "less than or equal to 1024"),
        ({"type": "bottleneck", "target_modules": ["lm_head"]}, "'down_proj'"),
        ({"type": "prefix_tuning", "num_virtual_tokens": 0}, "greater than or equal to 1"),
        ({"type": "prompt_tuning", "num_virtual_tokens": 513}, "less than or equal to 512"),
    ],
)
def test_what_no_method_computes_is_refused(peft: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainSpec.model_validate({"peft": peft})
