"""How the scheduler is set."""

from __future__ import annotations

from dataclasses import dataclass

from services.gpu_worker.engine.sharing import SharingName


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512  # inference tokens of one iteration
    max_model_len: int = 2048
    min_prompt_tokens: int = 32  # of prompts, computed in an iteration whatever its limit
    finetune_window: int = 1024  # largest window, tokens
    min_window: int = 32  # smaller pieces of work cost more than they bring
    idle_ms: float = 250.0  # longest iteration when nobody waits: an arrival waits at most this
    margin: float = (
        0.95  # share of the slack that is planned for; the rest is for what lies between iterations
    )
    patience: int = 10  # iterations without finetuning before a smallest window is taken regardless
    sharing: SharingName = "coserve"
    period: int = 64  # of temporal sharing, iterations
