"""The decoder computes what transformers computes, whoever shares the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.model.config import ModelConfig, UnsupportedModel
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import generate, make_engine, prompt_of

ARCHITECTURES = ("llama", "llama3.1", "qwen2", "qwen3", "mistral")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_transformers(tmp_path: Path, architecture: str, tied: bool) -> None:
    folder = make_tiny_model(tmp_path / "model", architecture, tied=tied, num_layers=3, num_heads=8)
    engine = make_engine(folder)
    prompt = prompt_of(engine, 90)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.log_softmax(reference(torch.tensor([prompt])).logits[0], -1)
    ours = generate(engine, prompt, Sampling(max_tokens=0, prompt_logprobs=5))
    assert ours.prompt_logprobs is not None and ours.prompt_logprobs[0] is None
    for position, entry in enumerate(ours.prompt_logprobs[1:]):
        assert entry is not None
        assert abs(entry.logprob - float(expected[position, prompt[position + 1]])) < 1e-4
        values = [value for _, value in entry.top]
        assert torch.allclose(expected[position].topk(5).values, torch.tensor(values), atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_raw_logits_differ_by_less_than_one_in_ten_thousand(tmp_path: Path, architecture: str) -> None:
    folder = make_tiny_model(tmp_path / "model", architecture, tied=False, num_layers=3, num_heads=8)
    engine = make_engine(folder)
    seen: list[torch.Tensor] = []
    original = engine.model.logits
    engine.model.logits = lambda *args: seen.append(original(*args)) or seen[-1].clone()  # type: ignore[method-assign,func-returns-value]
    prompt = prompt_of(engine, 60)
    output = generate(engine, prompt, Sampling(max_tokens=8)).tokens
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    assert (torch.cat(seen)[: len(output)] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_transformers(tmp_path: Path, architecture: str) -> None:
    folder = make_tiny_model(tmp_path / "model", architecture, num_heads=8)
    engine = make_engine(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for length in (1, 2, 17, 64):
        prompt = prompt_of(engine, length, seed=length)
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert generate(engine, prompt, Sampling(max_tokens=20)).tokens == theirs[0, length:].tolist()


def test_a_checkpoint_in_shards_gives_the_same_tokens(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "whole", num_layers=3)
    shards = make_tiny_model(tmp_path / "shards", num_layers=3)
    (shards / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    whole, parts = make_engine(folder), make_engine(shards)
    prompt = prompt_of(whole, 30)
    sampling = Sampling(max_tokens=20)
    assert generate(parts, prompt, sampling).tokens == generate(whole, prompt, sampling).tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_a_model_out_of_reach_is_refused_by_the_field(change: dict[str, object], words: str) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 300,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
    }
    with pytest.raises(UnsupportedModel, match=words):
        ModelConfig.from_hf({**config, **change})
