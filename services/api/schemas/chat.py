"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from services.api.schemas.fields import Body, Ignored, Metadata, SamplingBody, ServiceTier

MAX_MESSAGES = 1024
MAX_TOOLS = 128


class TextPart(Body):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Ignored = None


class FunctionCall(Body):
    name: str = Field(max_length=256)
    arguments: str


class ToolCall(Body):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


Content = Annotated[str | list[TextPart], Field(max_length=4 << 20)]


class ChatMessage(Body):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(default=None, max_length=256)
    refusal: str | None = None
    audio: None = None
    function_call: FunctionCall | None = None
    annotations: Ignored = None  # clients send a reply back as they got it

    @model_validator(mode="after")
    def has_content(self) -> ChatMessage:
        calls = self.tool_calls or self.function_call or self.refusal
        if self.content is None and not (self.role == "assistant" and calls):
            raise ValueError("content is required")
        return self

    def for_template(self) -> dict[str, Any]:
        """As the model's chat template takes it: one text."""
        message = self.model_dump(exclude_none=True, exclude={"content", "annotations", "refusal"})
        parts = self.content if isinstance(self.content, list) else None
        text = "".join(part.text for part in parts) if parts is not None else self.content
        return message | {"content": text if text is not None else self.refusal}


class ChatRequest(SamplingBody):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    service_tier: ServiceTier | None = None
    metadata: Metadata | None = None

    store: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    prediction: Ignored = None
    modalities: list[Literal["text"]] | None = None
    audio: Ignored = None
    moderation: Ignored = None
    web_search_options: None = None
    functions: None = None
    function_call: Literal["none", "auto"] | None = None

    @field_validator("response_format")
    @classmethod
    def only_text(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """A format that nothing enforces would be a promise without a cover."""
        if value is not None and value.get("type") != "text":
            raise ValueError("only {'type': 'text'} is supported")
        return value

    @model_validator(mode="after")
    def logprobs_belong_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
