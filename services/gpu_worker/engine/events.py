"""What an engine's step tells its caller."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.gpu_worker.engine.batch import Timing
from services.gpu_worker.engine.sequence import Logprob
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
    num_forward_tokens: int = 0  # of training and evaluation windows
    num_backward_tokens: float = 0.0  # token-layers / layers
    limit_ms: float = 0.0
    predicted_ms: float = 0.0
    timing: Timing = field(default_factory=Timing)
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0


@dataclass(slots=True)
class StepResult:
    """Of the iterations that have ended, in their order; `stats` of the last of them."""

    tokens: list[TokenEvent] = field(default_factory=list)
    jobs: list[JobEvent] = field(default_factory=list)
    stats: IterationStats = field(default_factory=IterationStats)
