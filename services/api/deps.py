"""What a route needs, found from the request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Request
from pydantic import ValidationError

from services.api.errors import invalid_field
from services.api.limits import read_json
from services.api.schemas.fields import Body
from services.api.state import ApiState
from shared.errors import InvalidRequestError, NotPermittedError
from shared.keys import KeyOwner, Scope

Model = TypeVar("Model", bound=Body)


def get_state(request: Request) -> ApiState:
    return cast(ApiState, request.app.state.api)


def get_owner(request: Request) -> KeyOwner:
    """Whose key it is; the authentication in front has put it there."""
    return cast(KeyOwner, request.scope["owner"])


def owner_with(scope: Scope) -> Callable[[Request], KeyOwner]:
    def require_scope(request: Request) -> KeyOwner:
        owner = get_owner(request)
        if scope not in owner.scopes:
            raise NotPermittedError(f"This API key lacks the scope {scope!r} that this operation needs.")
        return owner

    return require_scope


def body_of(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """The request's JSON body, checked."""

    async def parse(request: Request) -> Model:
        return check_body(model, await read_json(request))

    return parse


def check_body(model: type[Model], value: Any) -> Model:
    if not isinstance(value, dict):
        raise InvalidRequestError("the request body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_field(error, value) from None


StateDep = Annotated[ApiState, Depends(get_state)]
OwnerDep = Annotated[KeyOwner, Depends(get_owner)]
InferDep = Annotated[KeyOwner, Depends(owner_with("infer"))]
TrainDep = Annotated[KeyOwner, Depends(owner_with("train"))]
