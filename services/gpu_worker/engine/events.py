"""What an engine's step tells its caller."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.gpu_worker.engine.batch import Batch, Progress, Timing
from services.gpu_worker.engine.scheduler import Scheduler
from services.gpu_worker.engine.sequence import Logprob
from services.gpu_worker.finetune.job import Phase
from services.gpu_worker.finetune.reports import StepReport


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token of a request, its end, or both."""

    request_id: str
    token: int | None
    finish: str | None = None  # stop, length
    logprob: Logprob | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[Logprob | None] | None = None  # with the first event, where asked for

    @classmethod
    def of(cls, item: Progress) -> TokenEvent:
        sequence = item.sequence
        first = sequence.num_output_tokens <= 1
        return cls(
            sequence.request_id,
            item.sampled.token if item.sampled else None,
            item.finish,
            item.sampled.logprob if item.sampled else None,
            max(0, sequence.num_cached_tokens - sequence.num_virtual_tokens),
            sequence.prompt_logprobs if first and sequence.sampling.prompt_logprobs is not None else None,
        )


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A report of a job, its completion (`finished`), or its failure."""

    job_id: str
    report: StepReport | None = None
    finished: bool = False
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class IterationStats:
    """What one iteration was made of; tokens by kind, milliseconds planned and measured."""

    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    num_forward_tokens: float = 0.0  # of training and evaluation windows; token-layers / layers
    num_backward_tokens: float = 0.0
    limit_ms: float = 0.0
    predicted_ms: float = 0.0
    timing: Timing = field(default_factory=Timing)
    finetuning_ms: float = 0.0  # of these; of the fused forward by its rows
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0

    @classmethod
    def of(cls, batch: Batch, timing: Timing, scheduler: Scheduler) -> IterationStats:
        rows = sum(work.window.num_tokens for work in batch.forwards)
        share = rows / (rows + batch.num_inference_tokens) if rows else 0.0
        return cls(
            len(batch.decodes),
            batch.num_prompt_tokens,
            batch.num_tokens(Phase.FORWARD),
            batch.num_tokens(Phase.BACKWARD),
            batch.limit_ms,
            batch.predicted_ms,
            timing,
            share * timing.forward_ms + timing.steps_ms + timing.optimizer_ms,
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.blocks.num_free_blocks,
        )


@dataclass(slots=True)
class StepResult:
    """Of the iterations that have ended, in their order; `stats` of the last of them."""

    tokens: list[TokenEvent] = field(default_factory=list)
    jobs: list[JobEvent] = field(default_factory=list)
    stats: IterationStats = field(default_factory=IterationStats)
