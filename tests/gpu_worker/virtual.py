"""A scheduler in a world without tensors: a virtual clock, and iterations that take what a formula says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services.gpu_worker.engine.batch import Batch, Progress, Sampled
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.engine.latency import Curve, LatencyModel, Work
from services.gpu_worker.engine.scheduler import Scheduler
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Sampling, Sequence
from services.gpu_worker.engine.slo import DEFAULT_SLO, SLO
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig, Phase
from services.gpu_worker.finetune.packing import Examples

BLOCK_SIZE = 4
WORKS = (
    Work(decodes=3, keys=1000),
    Work(window_tokens=100, pairs=5000, loss_tokens=20, windows=3),
    Work(decodes=9, keys=900, window_tokens=64, loss_tokens=64, training_windows=2),
)


def make_latency(scale: float = 1.0) -> LatencyModel:
    """Forward 2 ms + 0.1 ms a token, training 0.02 ms a token more; of a layer alone forward 0.2 ms + 0.06 ms a token,
    backward 0.2 ms + 0.05 ms; the loss 0.1 ms + 0.02 ms; a decode's key 1 us, a window's pair 0.1 us in either
    direction."""
    sizes = [0, 1000]
    return LatencyModel(
        forward=Curve(sizes, [2.0 * scale, 102.0 * scale]),
        training=Curve(sizes, [0.0, 20.0 * scale]),
        layer=Curve(sizes, [0.2 * scale, 60.2 * scale]),
        loss=Curve(sizes, [0.1 * scale, 20.1 * scale]),
        backward=Curve(sizes, [0.2 * scale, 50.2 * scale]),
        optimizer_ms=1.0 * scale,
        keys=Curve(sizes, [0.0, 1.0 * scale]),
        pairs=Curve(sizes, [0.0, 0.1 * scale]),
        layer_pairs=Curve(sizes, [0.0, 0.1 * scale]),
        backward_pairs=Curve(sizes, [0.0, 0.1 * scale]),
    )


def times(model: LatencyModel) -> list[float]:
    """All that a model says of a few works, before any correction."""
    forward = [model.table_forward_ms(work) for work in WORKS]
    return [*forward, *(model.table_step_ms(work) for work in WORKS), model.optimizer_ms]


def make_sequence(
    request_id: str,
    num_prompt_tokens: int = 8,
    max_tokens: int = 8,
    first_token: int = 0,
    *,
    tpot_slo_ms: float = DEFAULT_SLO.tpot_ms,
    ttft_slo_ms: float = DEFAULT_SLO.ttft_ms,
    rank: int = DEFAULT_SLO.rank,
    **fields: Any,
) -> Sequence:
    """Prompts of different `first_token` share no prefix."""
    tokens = [first_token, *range(1, num_prompt_tokens)]
    fields = {"slo": SLO(tpot_slo_ms, ttft_slo_ms, rank), **fields}
    return Sequence(request_id, tokens, num_prompt_tokens, Sampling(max_tokens=max_tokens), **fields)


def make_job(
    job_id: str,
    lengths: list[int],
    *,
    batch_size: int = 1,
    num_layers: int = 2,
    in_flight: int = 64,
    weight: float = 1.0,
    tenant: str = "",
    evaluate: bool = False,
    **config: Any,
) -> FinetuneJob:
    examples = Examples(lengths, [n - 1 for n in lengths])
    settings = JobConfig(batch_size=batch_size, **config)
    return FinetuneJob(
        job_id,
        settings,
        examples,
        examples if evaluate else None,
        num_layers,
        in_flight,
        weight=weight,
        tenant=tenant,
    )


@dataclass(slots=True)
class World:
    """Runs a scheduler's batches; `actual` turns a batch's predicted milliseconds into those it takes."""

    scheduler: Scheduler
    actual: Callable[[float], float] = lambda predicted: predicted
    now_s: float = 0.0
    finished: list[str] = field(default_factory=list)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    gaps_ms: dict[str, list[float]] = field(default_factory=dict)  # between a sequence's tokens
    jobs_done: list[str] = field(default_factory=list)

    def step(self) -> Batch:
        for job in [job for job in self.scheduler.jobs if job.phase is Phase.DONE]:
            self.scheduler.remove_job(job)
            self.jobs_done.append(job.job_id)
        before = {s.request_id: s.last_token_s for s in self.scheduler.running}
        batch = self.scheduler.schedule(self.now_s)
        self.check(batch)
        self.now_s += max(0.1, self.actual(batch.predicted_ms)) / 1000
        sampled = [Sampled(chunk.sequence, 7) for chunk in batch.chunks if chunk.samples]
        self.scheduler.advance(batch, self.now_s)
        for progress in self.scheduler.receive(sampled, self.now_s):
            self._note(progress, before.get(progress.sequence.request_id))
        self.scheduler.blocks.check_integrity()
        return batch

    def _note(self, progress: Progress, last_token_s: float | None) -> None:
        request_id = progress.sequence.request_id
        if progress.sampled is not None:
            self.outputs.setdefault(request_id, []).append(progress.sampled.token)
            if last_token_s is not None:
                self.gaps_ms.setdefault(request_id, []).append((self.now_s - last_token_s) * 1000)
        if progress.finish is not None:
            self.finished.append(request_id)

    def check(self, batch: Batch) -> None:
        """What holds of every batch: nobody computes twice, and all that is written to is one's own."""
        sequences = [chunk.sequence for chunk in batch.chunks]
        assert len({id(s) for s in sequences}) == len(sequences)
        assert batch.num_inference_tokens <= self.scheduler.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler.config.max_num_seqs
        written: list[int] = []
        size = self.scheduler.blocks.block_size
        for chunk in batch.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
            assert sequence in self.scheduler.running
            assert chunk.start == sequence.num_computed_tokens and end <= sequence.num_tokens
            assert len(sequence.block_table) * size >= end
            written += {sequence.block_table[i // size] for i in range(chunk.start, end)}
        for work in batch.forwards + batch.steps:
            assert len(work.job.blocks) * size >= work.sequence.num_tokens
        for job in {id(work.job): work.job for work in batch.forwards + batch.steps}.values():
            written += job.blocks
        assert len(set(written)) == len(written), "two writers of one block"

    def run(self, max_steps: int = 20_000) -> None:
        """Until nothing is left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still working after {max_steps} iterations")


def make_world(
    *,
    num_blocks: int = 64,
    latency: LatencyModel | None = None,
    lane_latency: LatencyModel | None = None,
    actual: Callable[[float], float] = lambda predicted: predicted,
    **config: Any,
) -> World:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64, "finetune_window": 32}
    scheduler = Scheduler(
        SchedulerConfig(**{**limits, **config}),
        BlockManager(num_blocks, BLOCK_SIZE),
        latency or make_latency(),
        lane_latency,
    )
    return World(scheduler, actual)
