"""The tiers of requests, as OpenAI's `service_tier` names them, and what each is promised."""

from __future__ import annotations

from typing import Literal, NamedTuple

Tier = Literal["priority", "default", "flex"]


class ServiceLevel(NamedTuple):
    """Targets of a request, in milliseconds."""

    tpot_ms: float  # mean time between its tokens
    ttft_ms: float  # to its first token, waiting included
