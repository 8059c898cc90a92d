"""Measures the latency model's curves on the machine and model at hand, in seconds, before serving begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from services.gpu_worker.engine.batch import Batch, Chunk
from services.gpu_worker.engine.latency import PROFILE_SIZES, Curve, LatencyModel
from services.gpu_worker.engine.model_runner import ModelRunner
from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig, Window
from services.gpu_worker.finetune.loss import LossSum, window_loss
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.finetune.trainer import Trainer, examples_of
from services.gpu_worker.model.parallel import Group

REPEATS = 3
NUM_DECODES = 8
ENOUGH_MS = 200.0  # what takes longer is not repeated: small disturbances do not matter there


def profile(runner: ModelRunner, longest: int, policies: LayerPolicies) -> LatencyModel:
    """Curves up to `longest` tokens, of the backward for a job with these policies. Uses the first blocks of
    the cache; nothing may be in them yet."""
    capacity = runner.cache.num_blocks * runner.cache.block_size
    limit = min(longest, capacity, runner.model.max_position)
    sizes = [size for size in PROFILE_SIZES if size < limit] + [limit]
    trainer = _trainer(runner, limit, policies)
    last = runner.model.config.num_layers - 1  # the first layer's backward ends early

    fastest = partial(_fastest, group=runner.model.weights.group)

    def forward(num_sequences: int, start: int, end: int) -> float:
        return fastest(partial(_forward, runner, num_sequences, start, end))

    def backward(start: int, end: int) -> float:
        return fastest(partial(trainer.backward, Window(start, end, last)))

    model = LatencyModel(
        forward=Curve(sizes, [forward(1, 0, n) for n in sizes]),
        loss=Curve(sizes, [fastest(partial(_loss, runner, n)) for n in sizes]),
        backward=Curve(sizes, [backward(0, n) for n in sizes]),
        optimizer_ms=fastest(partial(trainer.parameters.step, 0.0)),
    )
    start = limit - max(
        1, limit // 8
    )  # of rows that have many keys before them; in the curves they have none
    rows, pairs = limit - start, max(1, (limit - start) * start)
    decodes_ms = forward(NUM_DECODES, limit - 1, limit) - model.forward(NUM_DECODES)
    model.key_ms = max(0.0, decodes_ms) / (NUM_DECODES * limit)
    model.pair_ms = max(0.0, forward(1, start, limit) - model.forward(rows)) / pairs
    model.backward_pair_ms = max(0.0, backward(start, limit) - model.backward(rows)) / pairs
    return model


def _fastest(work: Callable[[], object], group: Group) -> float:
    """Milliseconds of the fastest of a few runs: what the machine can do when nothing disturbs it.

    By rank 0's clock: every rank runs it as often and finds the same.
    """
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < ENOUGH_MS:
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(group.first((time.perf_counter() - started) * 1000))
    return min(times)


def _forward(runner: ModelRunner, num_sequences: int, start: int, end: int) -> None:
    """The tokens [start, end) of each sequence; they share their blocks, for values do not matter."""
    blocks = list(range(-(-end // runner.cache.block_size)))
    sequences = [
        Sequence("profile", [0] * end, end, block_table=blocks, num_computed_tokens=start)
        for _ in range(num_sequences)
    ]
    if end - start == 1:
        runner.run(Batch(decodes=sequences))
    else:
        runner.run(Batch(prompts=[Chunk(sequence, start, end - start) for sequence in sequences]))


def _loss(runner: ModelRunner, num_tokens: int) -> None:
    weights = runner.model.weights
    hidden = torch.ones(
        num_tokens, runner.model.config.hidden_size, dtype=weights.dtype, device=weights.device
    )
    labels = torch.zeros(num_tokens, dtype=torch.int64, device=weights.device)
    window_loss(runner.model, hidden, labels, LossSum.zero(weights.device), 1.0, torch.empty_like(hidden))


def _trainer(runner: ModelRunner, num_tokens: int, policies: LayerPolicies) -> Trainer:
    """A job of one example whose forward is skipped: the backward's time does not depend on values."""
    tokens = np.zeros(num_tokens, np.int32)
    dataset = Dataset(tokens, np.ones(num_tokens, np.uint8), np.array([0, num_tokens]))
    examples = examples_of(dataset, policies.compiled.method)
    num_layers = runner.model.config.num_layers
    job = FinetuneJob("profile", JobConfig(), examples, None, num_layers, num_tokens)
    job.blocks = list(range(-(-num_tokens // runner.cache.block_size)))
    trainer = Trainer(runner.model, runner.cache, job, dataset, None, policies)
    trainer.begin(job.sequence)
    trainer.store.clear()
    return trainer
