"""The baseline measured on tensors without values equals what real runs of transformers + peft keep."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from services.gpu_worker.baseline import (
    ADAPTER_DTYPES,
    AdapterDtype,
    AutogradBytes,
    BaselineUnavailable,
    BottleneckLinear,
    LiveBytes,
    autograd_bytes,
    checkpointing_bytes,
    logits_bytes,
    make_peft_model,
    saved_bytes,
)
from services.gpu_worker.compiler.presets import preset
from services.gpu_worker.model.peft import (
    BottleneckConfig,
    Ia3Config,
    InvalidAdapter,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
)

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(16, 32.0, ALL)
METHODS: dict[str, Method] = {
    "lora": LoraConfig(4, 8.0, ALL),
    "lora on one": LoraConfig(4, 8.0, ("down_proj",)),
    "lora on the vocabulary": LoraConfig(4, 8.0, ("q_proj", "embed_tokens", "lm_head")),
    "rslora": LoraConfig(4, 8.0, ALL, rslora=True),
    "dora": LoraConfig(4, 8.0, ALL, dora=True),
    "ia3": Ia3Config(),
    "serial": BottleneckConfig(8),
    "parallel": BottleneckConfig(8, activation="gelu", scaling=2.0, parallel=True),
    "prefix": PrefixConfig(5),
    "prompt": PromptConfig(5),
}
NUM_TOKENS = 24


def make_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type]
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        **changes,
    }


def real_bytes(
    config: dict[str, Any], method: Method, adapter_dtype: AdapterDtype, num_layers: int, dtype: torch.dtype
) -> int:
    model = make_peft_model(config, method, num_layers, adapter_dtype=adapter_dtype, dtype=dtype)
    tokens = torch.randint(config["vocab_size"], (1, NUM_TOKENS))
    return (
        saved_bytes(model, tokens)
        if isinstance(method, PrefixConfig)
        else saved_bytes(model, tokens, use_cache=False)
    )


@pytest.mark.parametrize(
    ("name", "adapter_dtype", "per_layer_token", "gib"),
    [
        ("Llama-3.1-8B", "model", 184_680, 45.09),
        ("Llama-3.1-8B", "float32", 295_496, 72.14),
        ("Llama-3.1-70B", "float32", 586_440, 357.93),
        ("Qwen2.5-14B", "model", 197_000, 72.14),
        ("Qwen2.5-14B", "float32", 327_272, 119.85),
        ("Qwen2.5-32B", "model", 307_592, 150.19),
        ("Qwen2.5-32B", "float32", 465_512, 227.30),
    ],
)
def test_lora_on_every_linear_of_a_large_model(
    name: str, adapter_dtype: AdapterDtype, per_layer_token: int, gib: float
) -> None:
    config = preset(name)
    found = autograd_bytes(config, LORA, num_tokens=8192, adapter_dtype=adapter_dtype)
    assert found.per_layer_token == per_layer_token
    assert round(config["num_hidden_layers"] * found.per_layer / 2**30, 2) == gib


@pytest.mark.parametrize("adapter_dtype", ADAPTER_DTYPES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_keeps_as_much_in_a_real_run(method: Method, adapter_dtype: AdapterDtype) -> None:
    config = make_config()
    found = autograd_bytes(config, method, num_tokens=NUM_TOKENS, adapter_dtype=adapter_dtype)
    for num_layers in (2, 4):
        assert found.total(num_layers) == real_bytes(
            config, method, adapter_dtype, num_layers, torch.bfloat16
        )


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_keeps_as_much_in_a_real_run(model_type: str, dtype: torch.dtype) -> None:
    config = make_config(model_type)
    method = METHODS["lora"]
    found = autograd_bytes(config, method, num_tokens=NUM_TOKENS, adapter_dtype="float32", dtype=dtype)
    assert found.total(4) == real_bytes(config, method, "float32", 4, dtype)


def test_attention_keeps_no_probabilities() -> None:
    config = make_config()
    once, twice = (
        autograd_bytes(config, LORA, num_tokens=n, adapter_dtype="model")
        for n in (NUM_TOKENS, 2 * NUM_TOKENS)
    )
    assert once.per_layer_token == twice.per_layer_token


@pytest.mark.parametrize(
    "method", [LORA, METHODS["serial"], METHODS["prompt"]], ids=["lora", "serial", "prompt"]
)
def test_a_checkpointed_layer_holds_its_input_alone(method: Method) -> None:
    held = []
    for num_layers in (2, 3):
        model = make_peft_model(make_config(), method, num_layers)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with LiveBytes() as live:
            loss = model(
                input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.int64), use_cache=False
            ).logits.sum()
            gc.collect()
            held.append(live.now)
        loss.backward()
    plain = AutogradBytes(NUM_TOKENS, per_layer=1000, outside=0)
    two, three = (checkpointing_bytes(make_config(num_hidden_layers=n), method, plain) for n in (2, 3))
    assert two is not None and three is not None
    assert three - two == held[1] - held[0]
    assert two == 2 * (three - two) + 1000


def test_prefixes_cannot_be_checkpointed() -> None:
    plain = AutogradBytes(NUM_TOKENS, per_layer=1000, outside=0)
    assert checkpointing_bytes(make_config(), METHODS["prefix"], plain) is None


def test_the_vocabulary_costs_as_much_in_a_real_run() -> None:
    config = make_config(vocab_size=5000)
    found = logits_bytes(config, NUM_TOKENS)
    head = nn.Linear(64, 5000, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(1, NUM_TOKENS, 64, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, NUM_TOKENS, dtype=torch.int64)
    with LiveBytes() as live:
        loss = ForCausalLMLoss(head(hidden), labels, 5000)
        kept = live.now
        loss.backward()
    assert (found.kept, found.peak) == (kept, live.peak)
    float32_logits = 4 * NUM_TOKENS * 5000
    assert float32_logits <= kept < 1.01 * float32_logits
    assert 3 * float32_logits <= live.peak < 3.01 * float32_logits


def test_live_bytes_follow_what_is_made_and_dropped() -> None:
    outside = torch.zeros(100)
    with LiveBytes() as live:
        a = torch.ones(10)
        b = a + outside[:10]
        view = b.view(2, 5)
        del a, b
        assert (live.now, live.peak) == (40, 80)
        del view
        outside.add_(1)
    assert (live.now, live.peak) == (0, 80)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_bottleneck_adds_what_its_configuration_says(parallel: bool) -> None:
    base = nn.Linear(6, 6)
    config = BottleneckConfig(3, activation="tanh", scaling=0.5, parallel=parallel)
    module = BottleneckLinear(base, config, torch.float32)
    x = torch.randn(4, 6)
    assert torch.equal(module(x), base(x))  # an untrained one changes nothing
    nn.init.normal_(module.adapter_up.weight)
    nn.init.normal_(module.adapter_up.bias)
    y = base(x)
    hidden = torch.tanh(module.adapter_down(x if parallel else y))
    torch.testing.assert_close(module(x), y + 0.5 * module.adapter_up(hidden))


@pytest.mark.parametrize("parallel", [False, True])
def test_bottlenecks_sit_on_every_target_and_nothing_else_is_trained(parallel: bool) -> None:
    method = BottleneckConfig(8, ("q_proj", "down_proj"), parallel=parallel)
    model = make_peft_model(make_config(), method, 2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"model.layers.{layer}.{target}.adapter_{part}"
        for layer in range(2)
        for target in ("self_attn.q_proj", "mlp.down_proj")
        for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    }


def test_what_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    with pytest.raises(InvalidAdapter, match="no target 'c_attn'"):
        autograd_bytes(config, LoraConfig(4, 8.0, ("c_attn",)), num_tokens=8, adapter_dtype="model")
    with pytest.raises(ValueError, match="num_tokens 0"):
        autograd_bytes(config, LORA, num_tokens=0, adapter_dtype="model")
    with pytest.raises(ValueError, match="model_type"):
        autograd_bytes({**config, "model_type": None}, LORA, num_tokens=8, adapter_dtype="model")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BaselineUnavailable, match="pip install peft"):
        autograd_bytes(config, LORA, num_tokens=8, adapter_dtype="model")
