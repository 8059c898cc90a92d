"""POST /v1/completions"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from services.api.deps import InferDep, StateDep, body_of
from services.api.formats.completions import CompletionFormat
from services.api.inference import Order, Run, tier_of
from services.api.model import BaseModel
from services.api.respond import respond
from services.api.sampling import completion_sampling
from services.api.schemas.completions import CompletionRequest

router = APIRouter()


@router.post("/v1/completions")
async def create(
    owner: InferDep,
    state: StateDep,
    body: Annotated[CompletionRequest, Depends(body_of(CompletionRequest))],
    request: Request,
) -> Response:
    target = await state.models.resolve(owner.tenant_id, body.model)
    prompts = [await encode(state.base, prompt) for prompt in body.prompts]
    for prompt in prompts:
        state.base.max_tokens(len(prompt), body.limit, target.num_virtual_tokens)
    order = Order(
        kind="cmpl",
        target=target,
        prompts=prompts,
        sampling=completion_sampling(body, state.base, body.limit),
        num_choices=body.num_choices,
        stops=body.stops,
        tier=tier_of(body.service_tier),
    )
    run = Run(state, owner, order)
    texts = await asyncio.to_thread(echoes, state.base, body, prompts) if body.echo else None
    answer = CompletionFormat(
        run, state.base.tokenizer, texts, body.logprobs, include_usage=body.includes_usage
    )
    return await respond(request, run, answer, is_stream=bool(body.stream))


async def encode(base: BaseModel, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return await base.encode_prompt(prompt)
    base.check_tokens(prompt, "prompt")
    return prompt


def echoes(base: BaseModel, body: CompletionRequest, prompts: list[list[int]]) -> list[str]:
    """The prompts as texts; token ids are spelled out."""
    return [
        asked if isinstance(asked, str) else base.tokenizer.decode(tokens)
        for asked, tokens in zip(body.prompts, prompts, strict=True)
    ]
