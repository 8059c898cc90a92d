"""Greedy decoding of equally long prompts, prompts included in the time: our engine and transformers' two ways."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.peers.turns import OURS, Run, Side, best, compared
from benchmarks.peers.vllm_client import Vllm
from services.gpu_worker.engine.config import EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT_TOKENS = 64
NEW_TOKENS = 48
BATCHES = (1, 8, 16)
CONTINUOUS_BATCHES = (8, 16)
VLLM_BATCHES = (1, 8, 32)
NO_TOKEN = -1  # as the token that ends a sequence: none does

Prompts = list[list[int]]


def make_engine(folder: Path, dtype: str, threads: int, **options: Any) -> Engine:
    """Without a latency target that a busy machine could miss."""
    scheduler = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=1024, idle_ms=1000.0)
    slos = {DEFAULT_TIER: SLO(tpot_ms=1e6, ttft_ms=1e6)}
    return Engine(EngineConfig(folder, "cpu", dtype, threads, slos=slos, scheduler=scheduler, **options))


def load_transformers(folder: Path, dtype: str) -> Any:
    """Of whose sequences no token is the end."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    model.generation_config.eos_token_id = None
    return model


def make_prompts(batch: int) -> Prompts:
    prompts: Prompts = np.random.default_rng(batch).integers(100, 40000, (batch, PROMPT_TOKENS)).tolist()
    return prompts


def serving(folder: Path, dtype: str, threads: int, rounds: int, vllm: Vllm | None) -> list[dict[str, Any]]:
    """A row for each batch size; a peer is measured where its `_BATCHES` say."""
    engine = make_engine(folder, dtype, threads)
    model = load_transformers(folder, dtype)
    rows = []
    with ContinuousBatching(load_transformers(folder, dtype)) as continuous:
        for batch in sorted({*BATCHES, *(VLLM_BATCHES if vllm else ())}):
            prompts = make_prompts(batch)
            sides: dict[str, Side] = {OURS: partial(generate_ours, engine, prompts)}
            sides["transformers"] = partial(generate_theirs, model, prompts)
            if batch in CONTINUOUS_BATCHES:
                sides["transformers, continuous batching"] = partial(continuous.generate, prompts)
            if vllm and batch in VLLM_BATCHES:
                sides["vLLM"] = partial(vllm.generate, prompts, NEW_TOKENS)
            rows.append({"batch": batch, **compared(best(rounds, sides))})
    return rows


def generate_ours(engine: Engine, prompts: Prompts, adapters: Sequence[str] | None = None) -> Run:
    """`adapters`: the digest of each prompt's."""
    started = time.perf_counter()
    outputs: dict[str, list[int]] = {f"r{i}": [] for i in range(len(prompts))}
    wanted: Sequence[str | None] = adapters or [None] * len(prompts)
    for name, prompt, adapter in zip(outputs, prompts, wanted, strict=True):
        sampling = Sampling(max_tokens=NEW_TOKENS)
        engine.add(name, prompt, sampling, adapter=adapter, cache_salt=str(started))
    while engine.has_work:
        for event in engine.step().tokens:
            if event.token is not None:
                outputs[event.request_id].append(event.token)
    return finished(list(outputs.values()), started)


def generate_theirs(model: Any, prompts: Prompts, **options: Any) -> Run:
    tokens = torch.tensor(prompts)
    started = time.perf_counter()
    with torch.no_grad():
        found = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            **options,
        )
    return finished(found[:, PROMPT_TOKENS:].tolist(), started)


def finished(outputs: list[list[int]], started: float) -> Run:
    seconds = time.perf_counter() - started
    assert all(len(output) == NEW_TOKENS for output in outputs)
    return Run(sum(map(len, outputs)), seconds, outputs)


class ContinuousBatching:
    """transformers' own scheduler and paged cache, started once; on CPUs without its GPU-only fast decode path.

    The model's attention is exchanged, so it must be nobody else's. Settings are the defaults, but for the
    cache, which would take most of the memory, and for prefixes of earlier rounds, which nobody may use.
    """

    def __init__(self, model: Any) -> None:
        generation = GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0
        )
        settings = ContinuousBatchingConfig(num_blocks=64, allow_block_sharing=False)
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=settings
        )

    def __enter__(self) -> ContinuousBatching:
        self._manager.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.stop(block=True)

    def generate(self, prompts: Prompts) -> Run:
        started = time.perf_counter()
        names = self._manager.add_requests(prompts, max_new_tokens=NEW_TOKENS)
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(prompts):
            result = self._manager.get_result(timeout=1)
            if result is None and not self._manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before its requests were done")
            if result is not None and result.is_finished():
                outputs[result.request_id] = result.generated_tokens
        return finished([outputs[name] for name in names], started)
