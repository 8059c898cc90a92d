"""A training's parameters in words, whatever its method."""

from __future__ import annotations

from typing import Any

import pytest

from services.adapter_store.admin.comparison import compare_parameters, describe_spec
from shared.messages import TrainSpec
from shared.models import AdapterVersion
from shared.peft import (
    LINEAR_TARGETS,
    BottleneckSpec,
    Ia3Spec,
    LoraSpec,
    PeftSpec,
    PrefixSpec,
    PromptSpec,
)


def words_of(peft: PeftSpec) -> dict[str, str]:
    """Those before the ones that every method has."""
    words = describe_spec(TrainSpec(peft=peft).model_dump(mode="json"))
    return dict(list(words.items())[: list(words).index("Epochs")])


@pytest.mark.parametrize(
    ("peft", "words"),
    [
        (LoraSpec(), {"Method": "LoRA", "Rank": "16", "Alpha": "32", "Targets": "all linear layers"}),
        (
            LoraSpec(alpha=8, use_rslora=True, target_modules=("q_proj", "lm_head"), dropout=0.1),
            {
                "Method": "LoRA",
                "Rank": "16",
                "Alpha": "8 / √rank",
                "Targets": "q_proj, lm_head",
                "Dropout": "0.1",
            },
        ),
        (
            LoraSpec(target_modules=(*LINEAR_TARGETS, "embed_tokens")),
            {"Method": "LoRA", "Rank": "16", "Alpha": "32", "Targets": "all linear layers, embed_tokens"},
        ),
        (
            LoraSpec(use_dora=True),
            {"Method": "DoRA", "Rank": "16", "Alpha": "32", "Targets": "all linear layers"},
        ),
        (
            Ia3Spec(),
            {"Method": "(IA)³", "Targets": "k_proj, v_proj, down_proj", "Scaled at the input": "down_proj"},
        ),
        (
            Ia3Spec(target_modules=("k_proj",), feedforward_modules=()),
            {"Method": "(IA)³", "Targets": "k_proj", "Scaled at the input": "none"},
        ),
        (
            BottleneckSpec(parallel=True),
            {
                "Method": "Parallel bottleneck adapter",
                "Size": "64",
                "Activation": "relu",
                "Scaling": "1",
                "Targets": "o_proj, down_proj",
            },
        ),
        (PrefixSpec(), {"Method": "Prefix tuning", "Virtual tokens": "16"}),
        (PromptSpec(num_virtual_tokens=3), {"Method": "Prompt tuning", "Virtual tokens": "3"}),
    ],
)
def test_each_method_is_told_by_its_own_fields(peft: PeftSpec, words: dict[str, str]) -> None:
    assert words_of(peft) == words


def test_a_row_from_before_there_were_other_methods_is_lora() -> None:
    assert describe_spec({"peft": {"type": "lora", "rank": 8}})["Method"] == "LoRA"
    assert describe_spec({})["Method"] == "LoRA"


def make_version(peft: PeftSpec, **fields: Any) -> AdapterVersion:
    spec = TrainSpec(peft=peft, **fields)
    return AdapterVersion(hyperparameters=spec.model_dump(mode="json"), base_digest="b" * 64, metrics={})


def test_versions_of_two_methods_are_compared_in_all_that_either_has() -> None:
    left, right = make_version(LoraSpec()), make_version(PromptSpec(), learning_rate=0.1)
    lines = {line.label: (line.left, line.right) for line in compare_parameters(left, right)}
    assert lines == {
        "Method": ("LoRA", "Prompt tuning"),
        "Rank": ("16", "–"),
        "Alpha": ("32", "–"),
        "Targets": ("all linear layers", "–"),
        "Virtual tokens": ("–", "16"),
        "Learning rate": ("2e-4", "0.1"),
    }
