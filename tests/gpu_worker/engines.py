"""Engines over tiny models, and requests run to their end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.gpu_worker.engine.config import EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import JobEvent, TokenEvent
from services.gpu_worker.engine.latency import Curve, LatencyModel
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Logprob, Sampling
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.parameters import parameters
from services.gpu_worker.model.peft import (
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
)
from services.gpu_worker.model.peft_files import write_peft

Files = dict[str, bytes]
LATENCY = LatencyModel(  # of a tiny model on a CPU: measuring takes longer than what most tests compute
    forward=Curve([1, 32, 96], [1.2, 1.3, 4.0]),
    training=Curve([1, 32], [1.5, 2.0]),
    layer=Curve([1, 32], [0.7, 0.9]),
    loss=Curve([1, 32], [0.8, 1.0]),
    backward=Curve([1, 32], [0.5, 0.7]),
    optimizer_ms=0.5,
    decodes=Curve([1, 16], [1.0, 1.1]),
)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS: dict[str, Method] = {
    "lora": LoraConfig(4, 6.0, TARGETS),
    "dora": LoraConfig(4, 6.0, TARGETS, dora=True),
    "lora-vocabulary": LoraConfig(4, 6.0, ("q_proj", "embed_tokens", "lm_head")),
    "ia3": Ia3Config(TARGETS, ("o_proj", "down_proj")),
    "ia3-outputs": Ia3Config(TARGETS, ()),
    "serial": BottleneckConfig(6, TARGETS, "gelu", 0.7),
    "parallel": BottleneckConfig(6, TARGETS, "silu", 1.5, parallel=True),
    "prefix": PrefixConfig(5),
    "prompt": PromptConfig(5),
}


@dataclass(slots=True)
class Output:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: str | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[Logprob | None] | None = None

    def add(self, event: TokenEvent) -> None:
        assert self.finish is None, "an event after the end"
        if event.token is not None:
            self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        self.finish = event.finish
        self.cached_tokens = event.cached_tokens
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs


def make_engine(
    folder: Path, *, num_blocks: int = 256, scheduler: dict[str, Any] | None = None, **config: Any
) -> Engine:
    """On one thread; the rest as `make_config` has it."""
    torch.set_num_threads(1)
    return Engine(make_config(folder, num_blocks=num_blocks, scheduler=scheduler, **config))


def make_timeless_engine(folder: Path, **options: Any) -> Engine:
    """Nothing takes time but to go forward layer by layer, so that windows are cut by their largest size alone, in
    every run the same."""
    engine = make_engine(folder, **options)
    nothing, never = Curve([0, 1], [0.0, 0.0]), Curve([0, 1], [0.0, 1e9])
    engine.scheduler.latency = LatencyModel(nothing, nothing, never, never, nothing, 0.0)
    return engine


def make_config(
    folder: Path, *, num_blocks: int = 256, scheduler: dict[str, Any] | None = None, **config: Any
) -> EngineConfig:
    """Float32, blocks of 4 tokens; `scheduler` and `config` override their dataclasses' fields."""
    model = ModelConfig.from_folder(folder)
    block_size = config.pop("block_size", 4)
    limits = {"max_model_len": 256, "max_num_batched_tokens": 64, "finetune_window": 32, "idle_ms": 1000.0}
    settings: dict[str, Any] = {
        "model_dir": folder,
        "device": "cpu",
        "dtype": "float32",
        "block_size": block_size,
        "kv_cache_bytes": num_blocks * block_size * model.num_layers * model.kv_size * 2 * 4,
        "finetune_tokens_in_flight": 256,
        "latency": LATENCY,
        "slos": {DEFAULT_TIER: SLO(10_000.0, 10_000.0)},  # what is tested must not depend on a busy machine
        "scheduler": SchedulerConfig(**{**limits, **(scheduler or {})}),
    }
    return EngineConfig(**{**settings, **config})


def prompt_of(engine: Engine, length: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(token) for token in rng.integers(3, engine.model.config.vocab_size, length)]


def run(engine: Engine, *request_ids: str, max_steps: int = 5000) -> tuple[dict[str, Output], list[JobEvent]]:
    """Steps until the requests are finished, or without any until the jobs are; blocks are checked each time."""
    outputs = {request_id: Output() for request_id in request_ids}
    jobs: list[JobEvent] = []
    for _ in range(max_steps):
        if request_ids and all(output.finish for output in outputs.values()):
            return outputs, jobs
        if not engine.has_work:
            break
        result = engine.step()
        engine.blocks.check_integrity()
        jobs += result.jobs
        for event in result.tokens:
            if event.request_id in outputs:
                outputs[event.request_id].add(event)
    assert all(output.finish for output in outputs.values()), "the engine stopped before its requests"
    return outputs, jobs


def generate(engine: Engine, prompt: list[int], sampling: Sampling, **options: Any) -> Output:
    request_id = f"r{len(prompt)}-{id(sampling)}"
    engine.add(request_id, prompt, sampling, **options)
    return run(engine, request_id)[0][request_id]


def together(
    engine: Engine, prompts: list[list[int]], sampling: list[Sampling], **options: Any
) -> list[Output]:
    """Requests added at once and run to their ends."""
    names = [f"r{i}" for i in range(len(prompts))]
    for name, prompt, how in zip(names, prompts, sampling, strict=True):
        engine.add(name, prompt, how, **options)
    outputs, _ = run(engine, *names)
    return [outputs[name] for name in names]


def tokens_of(outputs: list[Output]) -> list[list[int]]:
    return [output.tokens for output in outputs]


def make_adapter(
    model: ModelConfig, method: Method | None = None, *, seed: int = 0, std: float = 0.2
) -> Files:
    """The two files of an adapter with random values, large enough to change every token."""
    method = method or LoraConfig(4, 8.0, ("q_proj", "v_proj", "down_proj"))
    generator = torch.Generator().manual_seed(seed)
    values = {
        (p.layer, p.key): torch.randn(p.shape, generator=generator) * std
        + (1.0 if p.role in ("scale", "input_scale", "magnitude") else 0.0)
        for p in parameters(model, method)
    }
    return write_peft(model, method, "tiny", values)
