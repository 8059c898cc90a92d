"""Types that several bodies share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_STOP_CHARS = 128
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 300
SEED_RANGE = 2**63

Number = Annotated[float, Field(allow_inf_nan=False)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class Body(BaseModel):
    """A JSON true is no 1 and a "3" no 3; a field that is not known is refused by its name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis: not offered


def check_stops(stop: str | list[str] | None) -> str | list[str] | None:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop sequences")
    if any(not 1 <= len(each) <= MAX_STOP_CHARS for each in stops):
        raise ValueError(f"a stop sequence has 1 to {MAX_STOP_CHARS} characters")
    return stop


def check_logit_bias(bias: dict[str, float] | None) -> dict[str, float] | None:
    for token, value in (bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ValueError("the keys are token ids")
        if not -100 <= value <= 100:
            raise ValueError("the values are between -100 and 100")
    return bias


class SamplingBody(Body):
    """How tokens are drawn: OpenAI's fields, and the extensions that self-hosted servers share."""

    model: str = Field(min_length=1, max_length=256)
    temperature: Number | None = Field(default=None, ge=0, le=2)
    top_p: Number | None = Field(default=None, ge=0, le=1)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[str | list[str] | None, AfterValidator(check_stops)] = None
    frequency_penalty: Number | None = Field(default=None, ge=-2, le=2)
    presence_penalty: Number | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[
        dict[str, Number] | None, Field(max_length=MAX_LOGIT_BIAS), AfterValidator(check_logit_bias)
    ] = None
    seed: int | None = Field(default=None, ge=-SEED_RANGE, lt=SEED_RANGE)
    user: str | None = Field(default=None, max_length=256)

    top_k: int | None = Field(default=None, ge=-1, lt=2**31)  # -1 and 0: all
    min_p: Number | None = Field(default=None, ge=0, le=1)
    repetition_penalty: Number | None = Field(default=None, gt=0, le=10)
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        default=None, max_length=MAX_STOP_TOKENS
    )

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


Ignored = Any  # fields of OpenAI's schema that mean nothing here; bounded by the size of the body
ServiceTier = Literal["auto", "default", "flex", "scale", "priority"]
