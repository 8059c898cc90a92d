"""From the wire's PEFT specs to the engine's methods."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from services.gpu_worker.methods import method_of
from services.gpu_worker.model.peft import (
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
    num_virtual_tokens,
)
from shared.peft import (
    LINEAR_TARGETS,
    BottleneckSpec,
    Ia3Spec,
    LoraSpec,
    PeftSpec,
    PrefixSpec,
    PromptSpec,
)

PAIRS: list[tuple[PeftSpec, Method]] = [
    (LoraSpec(), LoraConfig(16, 32.0, LINEAR_TARGETS)),
    (
        LoraSpec(rank=4, alpha=8, use_rslora=True, target_modules=("q_proj", "lm_head")),
        LoraConfig(4, 8.0, ("q_proj", "lm_head"), rslora=True),
    ),
    (LoraSpec(use_dora=True), LoraConfig(16, 32.0, LINEAR_TARGETS, dora=True)),
    (Ia3Spec(), Ia3Config()),
    (Ia3Spec(target_modules=("k_proj",), feedforward_modules=()), Ia3Config(("k_proj",), ())),
    (BottleneckSpec(), BottleneckConfig(64)),
    (
        BottleneckSpec(size=8, target_modules=("q_proj",), activation="tanh", scaling=4.0, parallel=True),
        BottleneckConfig(8, ("q_proj",), activation="tanh", scaling=4.0, parallel=True),
    ),
    (PrefixSpec(num_virtual_tokens=3), PrefixConfig(3)),
    (PromptSpec(num_virtual_tokens=4), PromptConfig(4)),
]


@pytest.mark.parametrize(("spec", "method"), PAIRS)
def test_a_spec_names_its_method(spec: PeftSpec, method: Method) -> None:
    assert method_of(spec) == method
    assert num_virtual_tokens(method) == spec.num_virtual_tokens


@pytest.mark.parametrize("kind", ["lora", "ia3", "bottleneck", "prefix_tuning", "prompt_tuning"])
def test_the_defaults_of_every_type_are_a_method(kind: str) -> None:
    method_of(TypeAdapter(PeftSpec).validate_python({"type": kind}))
