"""From a request's fields to the engine's sampling parameters."""

from __future__ import annotations

import secrets

from services.api.model import BaseModel
from services.api.schemas.chat import ChatRequest
from services.api.schemas.completions import CompletionRequest
from services.api.schemas.fields import SEED_RANGE, SamplingBody
from shared.errors import InvalidRequestError
from shared.messages import SamplingParams

SMALLEST_TOP_P = 1e-9  # OpenAI allows 0: only the most likely token


def chat_sampling(body: ChatRequest, base: BaseModel, max_tokens: int) -> SamplingParams:
    return sampling(body, base, max_tokens, logprobs=body.num_logprobs)


def completion_sampling(body: CompletionRequest, base: BaseModel, max_tokens: int) -> SamplingParams:
    prompt_logprobs = body.logprobs if body.echo else None
    return sampling(body, base, max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)


def sampling(
    body: SamplingBody,
    base: BaseModel,
    max_tokens: int,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Raises InvalidRequestError for token ids that the model does not have."""
    stop_token_ids = tuple(body.stop_token_ids or ())
    logit_bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    base.check_tokens(stop_token_ids, "stop_token_ids")
    base.check_tokens(list(logit_bias), "logit_bias")
    top_k = max(body.top_k or 0, 0)
    if top_k > base.tokenizer.vocab_size:
        raise InvalidRequestError(
            f"top_k: at most the vocabulary's {base.tokenizer.vocab_size} tokens", param="top_k"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else max(body.top_p, SMALLEST_TOP_P),
        top_k=top_k,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=logit_bias,
        seed=secrets.randbelow(SEED_RANGE) if body.seed is None else body.seed % SEED_RANGE,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
