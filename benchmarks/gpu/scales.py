"""How large and how long the measurements are: whole, in two minutes, or small enough for a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from services.gpu_worker.compiler.presets import preset

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = {"8b": "Llama-3.1-8B", "14b": "Qwen2.5-14B", "32b": "Qwen2.5-32B"}


@dataclass(frozen=True, slots=True)
class Scale:
    """Tokens and seconds; after `budgets_s` a section is cut."""

    groups: tuple[int, ...] = (1, 4, 5, 7, 8)  # query heads per key head that attention is checked with
    head_dim: int = 128
    kernel_rows: int = 1000  # that kernels of rows are checked with
    kernel_vocabulary: int = 16_000
    copy_bytes: int = 2 << 30
    matmul_size: int = 8192
    ceiling_s: float = 1.5
    context: int = 6144  # of requests; the trace's are scaled to it: some 500 tokens each, on average
    decode_batches: tuple[int, ...] = (1, 16, 64, 128)
    decode_context: int = 1024
    decode_steps: int = 24
    prompts: tuple[int, ...] = (512, 2048, 4096)
    prompt_tokens: int = 16_384  # in all, for each of these lengths
    batched_tokens: int = 2048  # of prompts, in an iteration
    train_tokens: int = 2048  # of a sequence
    train_s: float = 4.0
    rates: tuple[float, ...] = (5, 20, 1, 10, 2)
    tpot_ms: tuple[float, ...] = (50, 25)
    ttft_ms: float = 2000
    trace_s: float = 6.0  # in which requests arrive
    wait_s: float = 6.0  # for the last of them
    periods: tuple[int, ...] = (64, 128, 0)  # of temporal sharing; 0: it follows the load
    period_rates: tuple[float, ...] = (5, 20)
    memory_tokens: int = 8192
    loss_steps: int = 100
    loss_shape: tuple[int, int, int, int] = (512, 1408, 8, 4096)  # hidden, feed-forward, layers, vocabulary
    loss_tokens: int = 256
    budgets_s: dict[str, float] = field(
        default_factory=lambda: {
            "kernels": 70.0,
            "ceilings": 8.0,
            "start": 40.0,
            "decode": 30.0,
            "prefill": 15.0,
            "finetuning": 30.0,
            "coserving": 130.0,
            "temporal": 45.0,
            "memory": 45.0,
            "losses": 30.0,
            "profile": 25.0,
        }
    )


FULL = Scale()
QUICK = replace(
    FULL,
    groups=(),  # the model's own alone
    ceiling_s=0.5,
    decode_batches=(1, 64),
    decode_steps=16,
    prompts=(2048,),
    train_s=2.0,
    rates=(5, 20),
    tpot_ms=(50,),
    trace_s=4.0,
    wait_s=2.0,
    periods=(64,),
    period_rates=(5,),
    loss_steps=20,
    budgets_s={
        "kernels": 16.0,
        "ceilings": 3.0,
        "start": 12.0,
        "decode": 10.0,
        "prefill": 4.0,
        "finetuning": 10.0,
        "coserving": 32.0,
        "temporal": 8.0,
        "memory": 10.0,
        "losses": 6.0,
        "profile": 6.0,
    },
)
TINY = Scale(
    groups=(5,),
    head_dim=16,
    kernel_rows=9,
    kernel_vocabulary=130,
    copy_bytes=1 << 20,
    matmul_size=128,
    ceiling_s=0.02,
    context=256,
    decode_batches=(1, 4),
    decode_context=24,
    decode_steps=4,
    prompts=(32,),
    prompt_tokens=64,
    batched_tokens=64,
    train_tokens=64,
    train_s=0.3,
    rates=(5,),
    tpot_ms=(500,),
    trace_s=2.0,
    periods=(2, 0),
    period_rates=(5,),
    memory_tokens=96,
    loss_steps=4,
    loss_shape=(64, 128, 2, 384),
    loss_tokens=24,
    budgets_s=dict.fromkeys(FULL.budgets_s, 300.0),  # on a CPU that others use as well
)


def shape_of(
    config: dict[str, Any], hidden: int, intermediate: int, layers: int, vocabulary: int
) -> dict[str, Any]:
    """The same kind of model with other sizes, and four query heads per key head."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": hidden // 8}
    tokens = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2}
    return config | sizes | heads | tokens


def config_of(model: str, scale: Scale) -> dict[str, Any]:
    """`config.json` of a key of MODELS."""
    config = preset(MODELS[model])
    return shape_of(config, *TINY.loss_shape) if scale is TINY else config
