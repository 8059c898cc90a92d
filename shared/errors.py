"""Refusals with words for the customer and a code for their program.

Every service answers them in one shape: `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """Base of every refusal. `param` names the request's field that is wrong, where there is one."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(ServiceError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class NotAuthenticatedError(ServiceError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class NotPermittedError(ServiceError):
    status = 403
    type = "insufficient_permissions"
    code = "insufficient_permissions"


class NotFoundError(ServiceError):
    """Also for what belongs to another tenant: nobody learns that it exists."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ConflictError(ServiceError):
    """The thing is not in a state that allows this."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class StaleFenceError(ConflictError):
    """The caller's lease on the job is over; another may hold it. Stop and discard."""

    code = "stale_fence"


class NotClaimableError(ConflictError):
    code = "not_claimable"


class JobCancelledError(ConflictError):
    """The customer's cancellation came first; there is nothing to publish."""

    code = "job_cancelled"


class IdempotencyMismatchError(ServiceError):
    """The Idempotency-Key was used before with another request."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"


class LimitExceededError(ServiceError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
