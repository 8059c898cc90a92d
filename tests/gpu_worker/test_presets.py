"""The shapes of well-known models are those that their publishers state."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from services.gpu_worker.compiler.presets import PRESETS, preset
from services.gpu_worker.model.config import ModelConfig, UnsupportedModel

PUBLISHED_PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "SmolLM2-135M": 134_515_008,
}


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_builds_a_model_of_the_published_size(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert model.num_parameters() == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_our_decoder_accepts_the_configuration(name: str) -> None:
    config = ModelConfig.from_hf(preset(name))
    assert config.qkv_bias == name.startswith("Qwen")
    assert config.q_size == config.hidden_size
    assert (config.rope.kind == "llama3") == name.startswith("Llama")


def test_names_are_found_in_any_case_and_copies_are_the_callers_own() -> None:
    mine = preset("llama-3.1-8b")
    mine["rope_scaling"]["factor"] = 1.0
    assert preset("Llama-3.1-8B")["rope_scaling"]["factor"] == 8.0


def test_an_unknown_name_gets_the_list_of_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match=r"'GPT-2', only for Llama-3\.1-8B, .*SmolLM2-135M"):
        preset("GPT-2")
