"""What rounding a backbone's weights costs: the perplexity of texts in each form, by the engine itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from services.gpu_worker.dry_run import BLOCK_SIZE, FORMS, Form, cache_bytes_per_token
from services.gpu_worker.engine.config import DTYPES, EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Logprob, Sampling
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO
from services.gpu_worker.model.config import ModelConfig, UnsupportedModel

MOST_SCORED = 1024  # tokens of one text
TEXTS_AT_ONCE = 4


def score(engine: Engine, texts: Sequence[list[int]]) -> list[list[Logprob | None]]:
    """Of every token of the texts, given those before it, with the likeliest beside; of a first token None."""
    scored: dict[str, list[Logprob | None]] = {}
    for number, tokens in enumerate(texts):
        engine.add(str(number), tokens, Sampling(max_tokens=0, prompt_logprobs=1))
    while engine.has_work:
        for event in engine.step().tokens:
            if event.prompt_logprobs is not None:
                scored[event.request_id] = event.prompt_logprobs
    return [scored[str(number)] for number in range(len(texts))]


def perplexity(scored: Sequence[Sequence[Logprob | None]]) -> float:
    """Of all tokens that have a probability; there has to be one."""
    found = [own.logprob for row in scored for own in row if own is not None]
    return math.exp(-sum(found) / len(found))


def perplexities(folder: Path, dtype: str, texts: Sequence[list[int]]) -> dict[Form, float]:
    """Of the texts, each at most MOST_SCORED tokens, by the model in every form that can hold it.

    Raises UnsupportedModel for a model that is none of ours.
    """
    model = ModelConfig.from_folder(folder)
    longest = -(-max(map(len, texts)) // BLOCK_SIZE) * BLOCK_SIZE
    cache = TEXTS_AT_ONCE * longest * cache_bytes_per_token(model, DTYPES[dtype])
    limits = SchedulerConfig(max_model_len=longest, idle_ms=math.inf)
    found: dict[Form, float] = {}
    for form in FORMS:
        config = EngineConfig(
            folder,
            dtype=dtype,
            quantise=form,
            block_size=BLOCK_SIZE,
            kv_cache_bytes=cache,
            finetune_tokens_in_flight=longest,
            slos={DEFAULT_TIER: SLO(tpot_ms=math.inf, ttft_ms=math.inf)},
            scheduler=limits,
        )
        try:
            engine = Engine(config)
        except UnsupportedModel:
            if form == "none":
                raise
            continue
        found[form] = perplexity(score(engine, texts))
    return found
