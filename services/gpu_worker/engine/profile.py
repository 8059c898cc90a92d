"""Measures the latency model's curves on the machine and model at hand, in seconds, before serving begins."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from services.gpu_worker.engine.batch import Batch, Chunk
from services.gpu_worker.engine.latency import PROFILE_SIZES, Curve, LatencyModel
from services.gpu_worker.engine.model_runner import ModelRunner
from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig, Window
from services.gpu_worker.finetune.loss import LossSum, window_loss
from services.gpu_worker.finetune.trainer import Trainer, examples_of
from services.gpu_worker.model.adapters import LoraConfig, projections

REPEATS = 3
ENOUGH_MS = 200.0  # what takes longer is not repeated: small disturbances do not matter there


def profile(runner: ModelRunner, largest: int, policy: str) -> LatencyModel:
    """Curves up to `largest` tokens. Uses the first blocks of the cache; nothing may be in them yet."""
    capacity = runner.cache.num_blocks * runner.cache.block_size
    limit = min(largest, capacity, runner.model.max_position)
    sizes = [size for size in PROFILE_SIZES if size < limit] + [limit]
    trainer = _trainer(runner, limit, policy)
    last = runner.model.config.num_layers - 1  # the first layer's backward ends early
    return LatencyModel(
        forward=Curve(sizes, [_fastest(lambda n=n: _forward(runner, n)) for n in sizes]),  # type: ignore[misc]
        loss=Curve(sizes, [_fastest(lambda n=n: _loss(runner, n)) for n in sizes]),  # type: ignore[misc]
        backward=Curve(sizes, [_fastest(lambda n=n: trainer.backward(Window(0, n, last))) for n in sizes]),  # type: ignore[misc]
        optimizer_ms=_fastest(lambda: trainer.parameters.step(0.0)),
    )


def _fastest(work: Callable[[], object]) -> float:
    """Milliseconds of the fastest of a few runs: what the machine can do when nothing disturbs it."""
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < ENOUGH_MS:
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1000)
    return min(times)


def _forward(runner: ModelRunner, num_tokens: int) -> None:
    blocks = list(range(-(-num_tokens // runner.cache.block_size)))
    sequence = Sequence("profile", [0] * num_tokens, num_tokens, block_table=blocks)
    runner.run(Batch(chunks=[Chunk(sequence, 0, num_tokens)]))


def _loss(runner: ModelRunner, num_tokens: int) -> None:
    weights = runner.model.weights
    hidden = torch.ones(
        num_tokens, runner.model.config.hidden_size, dtype=weights.dtype, device=weights.device
    )
    labels = torch.zeros(num_tokens, dtype=torch.int64, device=weights.device)
    window_loss(runner.model, hidden, labels, LossSum.zero(weights.device), 1.0, torch.empty_like(hidden))


def _trainer(runner: ModelRunner, num_tokens: int, policy: str) -> Trainer:
    """A job of one example whose forward is skipped: the backward's time does not depend on values."""
    tokens = np.zeros(num_tokens, np.int32)
    dataset = Dataset(tokens, np.ones(num_tokens, np.uint8), np.array([0, num_tokens]))
    config = runner.model.config
    job = FinetuneJob("profile", JobConfig(), examples_of(dataset), None, config.num_layers, num_tokens)
    job.blocks = list(range(-(-num_tokens // runner.cache.block_size)))
    lora = LoraConfig(rank=16, alpha=16, targets=tuple(projections(config)))
    trainer = Trainer(runner.model, runner.cache, job, lora, dataset, None, policy)
    trainer.begin(job.sequence)
    trainer.store.clear()
    return trainer
