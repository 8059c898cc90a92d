"""Runs what the latency model is made of on the machine and model at hand, in seconds, before serving begins."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from services.gpu_worker.engine.batch import Batch, Chunk, JobWindow
from services.gpu_worker.engine.fit import LARGE, SHORT, SMALL, Extent, Span, agrees, fit
from services.gpu_worker.engine.in_flight import RunResult
from services.gpu_worker.engine.interference import (
    ONE_AFTER_THE_OTHER,
    BackwardStream,
    Interference,
    Overlap,
    choose,
)
from services.gpu_worker.engine.latency import LatencyModel, StepKind
from services.gpu_worker.engine.model_runner import ModelRunner
from services.gpu_worker.engine.profile_cache import ProfileCache
from services.gpu_worker.engine.sequence import Sequence as Request
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig, Phase, Window
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.finetune.trainer import Trainer, examples_of

log = logging.getLogger(__name__)
REPEATS = 3
ENOUGH_MS = 200.0  # what takes longer is run twice, and once from twice as long on
WARM_UP_S = 3.0  # at most
IN_A_ROW = 3  # iterations that are launched before one is waited for
MOST_STEPS = 64  # beside one forward
BUDGET_MS = 10_000.0  # after which nothing is repeated: on a machine so busy only the correction can help


def profile(
    runner: ModelRunner,
    extent: Extent,
    policies: LayerPolicies,
    cache: ProfileCache | None = None,
    grain: int = 32,
) -> LatencyModel:
    """The latency model of a machine that trains with these policies in windows of multiples of `grain`: an earlier
    start's where there is one that still holds. Uses blocks of the key/value cache; nothing may be in them yet."""
    group = runner.model.weights.group
    machine = ModelMachine(runner, extent, policies)
    try:
        machine.warm_up(extent, grain)
        kept = cache.load(group) if cache else None
        if kept is not None:
            if agrees(machine, extent, kept):
                return kept
            log.warning("the machine is not as fast as its kept profile says: it is measured again")
        model = fit(machine, extent)
        if cache:
            cache.save(model, group)
        return model
    finally:
        machine.close()


def measure_interference(
    runner: ModelRunner, extent: Extent, policies: LayerPolicies, choice: BackwardStream
) -> Interference | None:
    """What it means for decodes and a backward to run at once, on a runner that has a side stream; None where they had
    better not. Uses blocks of the cache as `profile` does."""
    machine = ModelMachine(runner, extent, policies)
    try:
        return choose(choice, *machine.overlap(extent))
    finally:
        machine.close()


def extent_of(runner: ModelRunner, decodes: int, context: int, rows: int, window: int) -> Extent:
    """What was asked for, as far as the key/value cache and the positions reach."""
    keys = runner.cache.num_blocks * runner.cache.block_size
    most = min(keys, runner.model.max_position)
    rows = min(rows, most)
    return Extent(decodes, min(context, most), keys, rows, min(window, rows), rows)


class ModelMachine:
    """The engine's own runner, with two jobs whose examples are nothing but zeros: time does not depend on values."""

    def __init__(self, runner: ModelRunner, extent: Extent, policies: LayerPolicies) -> None:
        self._runner = runner
        self._spent_ms = 0.0
        self._last_layer = runner.model.config.num_layers - 1  # the first layer's backward ends early
        lengths = (extent.sequence, min(SMALL, extent.window))
        self._trainers = [_trainer(runner, f"profile-{n}", n, policies) for n in lengths]
        runner.trainers |= {trainer.job.job_id: trainer for trainer in self._trainers}
        self.forward(prompts=[(0, lengths[1])])  # what runs for the first time takes longer

    def warm_up(self, extent: Extent, grain: int) -> None:
        """Goes forward and backward in windows of each size, the smallest first: a CPU's library makes something for
        each product of a size that it has not seen, which takes several times as long as the products of a small
        window."""
        until_s = time.perf_counter() + WARM_UP_S
        for size in range(grain, extent.window + 1, grain):
            if torch.cuda.is_available() or time.perf_counter() > until_s:
                return
            for kind in (StepKind.FORWARD, StepKind.BACKWARD):
                self._step(kind, 0, size)()

    def close(self) -> None:
        for trainer in self._trainers:
            self._runner.trainers.pop(trainer.job.job_id, None)

    def forward(
        self,
        *,
        decodes: int = 0,
        context: int = SHORT,
        prompts: Sequence[Span] = (),
        windows: Sequence[Span] = (),
    ) -> float:
        return self._fastest(lambda: self._run(decodes, context, prompts, windows))

    def layer(self, start: int, end: int) -> float:
        return self._fastest(self._step(StepKind.FORWARD, start, end))

    def loss(self, num_tokens: int) -> float:
        """Of rows of zeros: logits far apart have denormal exponentials, which take a CPU ten times as long."""
        trainer, model = self._trainers[0], self._runner.model
        weights = model.weights
        hidden = torch.zeros(num_tokens, model.config.hidden_size, dtype=weights.dtype, device=weights.device)
        return self._fastest(partial(trainer.finish_forward, Window(0, num_tokens), hidden))

    def backward(self, start: int, end: int) -> float:
        return self._fastest(self._step(StepKind.BACKWARD, start, end))

    def _step(self, kind: StepKind, start: int, end: int) -> Callable[[], object]:
        return partial(self._runner.step, self._job_step(kind, start, end))

    def _job_step(self, kind: StepKind, start: int, end: int) -> JobWindow:
        """Through the last layer."""
        job = self._trainers[0].job
        phase = Phase.BACKWARD if kind is StepKind.BACKWARD else Phase.FORWARD
        return JobWindow(job, job.sequence, Window(start, end, self._last_layer, phase))

    def optimizer(self) -> float:
        return self._fastest(partial(self._trainers[0].parameters.step, 0.0))

    def overlap(self, extent: Extent) -> tuple[Overlap, Overlap]:
        """Decodes, and steps of the backward that take about as long: alone, then at once."""
        context = max(SHORT, min(extent.context, extent.keys // extent.decodes) // 2)
        decodes = [self._request(i, context, context - 1) for i in range(extent.decodes)]
        step = self._job_step(StepKind.BACKWARD, 0, min(LARGE, extent.window))
        forward_ms = self._overlap(Batch(decodes=decodes)).forward_ms
        count = round(forward_ms / self._overlap(Batch(steps=[step])).backward_ms)
        steps = [step] * min(MOST_STEPS, max(1, count))
        alone = Overlap(forward_ms, self._overlap(Batch(steps=steps)).backward_ms)
        both = Batch(decodes=decodes, steps=steps, interference=ONE_AFTER_THE_OTHER)
        return alone, self._overlap(both)

    def _overlap(self, batch: Batch) -> Overlap:
        """Of the fastest of a few iterations, launched in a row so that the device need not wait for the host; the
        first ones find kernels and graphs to be made."""
        found: list[Overlap] = []
        for _ in range(REPEATS):
            flights = [self._runner.launch(batch) for _ in range(IN_A_ROW)]
            found += [self._found(flight.collect()) for flight in flights]
        return min(found, key=lambda each: each.span_ms)

    def _found(self, result: RunResult) -> Overlap:
        for _, error in result.failures:
            raise error
        (lane,) = result.timing.lanes
        both_ms = lane.forward_ms + lane.steps_ms - result.timing.total_ms
        return Overlap(lane.forward_ms, lane.steps_ms, max(0.0, both_ms))

    def _run(self, decodes: int, context: int, prompts: Sequence[Span], windows: Sequence[Span]) -> None:
        batch = Batch(decodes=[self._request(i, context, context - 1) for i in range(decodes)])
        batch.prompts = [
            Chunk(self._request(i, end, start), start, end - start) for i, (start, end) in enumerate(prompts)
        ]
        for trainer, span in zip(self._trainers, windows, strict=False):
            batch.forwards.append(JobWindow(trainer.job, trainer.job.sequence, Window(*span)))
        for _, error in self._runner.run(batch).failures:
            raise error

    def _request(self, index: int, num_tokens: int, num_computed: int) -> Request:
        """With blocks of its own as far as they last: keys that others have just read would come fast."""
        cache = self._runner.cache
        width = -(-num_tokens // cache.block_size)
        blocks = [(index * width + i) % cache.num_blocks for i in range(width)]
        tokens = [0] * num_tokens
        return Request("profile", tokens, num_tokens, block_table=blocks, num_computed_tokens=num_computed)

    def _fastest(self, work: Callable[[], object]) -> float:
        """Milliseconds of the fastest of a few runs: what the machine can do when nothing disturbs it.

        By rank 0's clock: every rank runs it as often and finds the same.
        """
        group = self._runner.model.weights.group
        times: list[float] = []
        while len(times) < self._repeats(sum(times)):
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(group.first((time.perf_counter() - started) * 1000))
        self._spent_ms += sum(times)
        return min(times)

    def _repeats(self, taken_ms: float) -> int:
        if self._spent_ms > BUDGET_MS:
            return 1
        return REPEATS if taken_ms < ENOUGH_MS else 2 if taken_ms < 2 * ENOUGH_MS else 1


def _trainer(runner: ModelRunner, job_id: str, num_tokens: int, policies: LayerPolicies) -> Trainer:
    """A job of one example, which has been forward: a backward can follow at once."""
    dataset = Dataset(
        np.zeros(num_tokens, np.int32), np.ones(num_tokens, np.uint8), np.array([0, num_tokens])
    )
    examples = examples_of(dataset, policies.compiled.method)
    num_layers = runner.model.config.num_layers
    job = FinetuneJob(job_id, JobConfig(), examples, None, num_layers, num_tokens)
    job.blocks = list(range(-(-num_tokens // runner.cache.block_size)))
    trainer = Trainer(runner.model, runner.cache, job, dataset, None, policies)
    trainer.begin(job.sequence)
    trainer.store.clear()
    return trainer
