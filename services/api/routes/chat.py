"""POST /v1/chat/completions"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from services.api.deps import InferDep, StateDep, body_of
from services.api.formats.chat import ChatFormat
from services.api.inference import Order, Run, tier_of
from services.api.respond import respond
from services.api.sampling import chat_sampling
from services.api.schemas.chat import ChatRequest
from services.api.state import ApiState
from shared.errors import InvalidRequestError
from shared.keys import KeyOwner

router = APIRouter()


@router.post("/v1/chat/completions")
async def create(
    owner: InferDep,
    state: StateDep,
    body: Annotated[ChatRequest, Depends(body_of(ChatRequest))],
    request: Request,
) -> Response:
    run = Run(state, owner, await make_order(state, owner, body))
    answer = ChatFormat(run, state.base.tokenizer, bool(body.logprobs), include_usage=body.includes_usage)
    return await respond(request, run, answer, is_stream=bool(body.stream))


async def make_order(state: ApiState, owner: KeyOwner, body: ChatRequest) -> Order:
    target = await state.models.resolve(owner.tenant_id, body.model)
    tools = body.tools if body.tool_choice != "none" else None
    if tools and not state.base.renders_tools:
        raise InvalidRequestError("The model's chat template has no place for tools.", param="tools")
    prompt = await state.base.encode_chat([message.for_template() for message in body.messages], tools)
    max_tokens = state.base.max_tokens(len(prompt), body.limit, target.num_virtual_tokens)
    return Order(
        kind="chatcmpl",
        target=target,
        prompts=[prompt],
        sampling=chat_sampling(body, state.base, max_tokens),
        num_choices=body.num_choices,
        stops=body.stops,
        tier=tier_of(body.service_tier),
    )
