"""GET /v1/models, GET and DELETE /v1/models/{model}. A model's name may hold slashes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from services.api.adapters import unknown_model
from services.api.deps import OwnerDep, StateDep, TrainDep
from services.api.model import BaseModel
from shared.db import tenant_transaction
from shared.errors import NotFoundError, NotPermittedError
from shared.registry import ServedModel, find_model, list_models
from shared.versions import retire_model

router = APIRouter()


@router.get("/v1/models")
async def list_all(owner: OwnerDep, state: StateDep) -> dict[str, Any]:
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        served = await list_models(session, owner.tenant_id, base_digest=state.base.base_digest)
    cards = [base_card(state.base), *(adapter_card(model, owner.org) for model in served)]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{model:path}")
async def retrieve(model: str, owner: OwnerDep, state: StateDep) -> dict[str, Any]:
    if model == state.base.id:
        return base_card(state.base)
    async with tenant_transaction(state.sessions, owner.tenant_id) as session:
        version = await find_model(session, owner.tenant_id, model)
    if version is None or version.base_digest != state.base.base_digest:
        raise unknown_model(model)
    return adapter_card(ServedModel(model, version, version.created_at), owner.org)


@router.delete("/v1/models/{model:path}")
async def delete(model: str, owner: TrainDep, state: StateDep) -> dict[str, Any]:
    """Stops serving a version; requests that run keep it to their end."""
    if model == state.base.id:
        raise NotPermittedError("The base model cannot be deleted.", param="model")
    try:
        async with tenant_transaction(state.sessions, owner.tenant_id) as session:
            await retire_model(session, owner.tenant_id, model, actor=f"key:{owner.key_id}")
    except NotFoundError:
        raise unknown_model(model) from None
    return {"id": model, "object": "model", "deleted": True}


def base_card(base: BaseModel) -> dict[str, Any]:
    return {
        "id": base.id,
        "object": "model",
        "created": base.created_at,
        "owned_by": "system",
        "max_model_len": base.max_model_len,
    }


def adapter_card(served: ServedModel, org: str) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": int(served.created_at.timestamp()),
        "owned_by": org,
        "parent": served.version.base_model,
        "digest": served.version.digest,
    }
