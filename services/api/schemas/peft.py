"""`flexllm.peft`: which method a job trains, each with its own fields. Without a `type` it is LoRA."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from services.api.schemas.fields import Body, Number
from shared.peft import (
    LINEAR_TARGETS,
    LORA_TARGETS,
    MAX_BOTTLENECK,
    MAX_RANK,
    MAX_SCALE,
    MAX_VIRTUAL_TOKENS,
    OUTER_TARGETS,
    Activation,
    BottleneckSpec,
    FeedforwardTarget,
    Ia3Spec,
    LinearTarget,
    LoraSpec,
    LoraTarget,
    PrefixSpec,
    PromptSpec,
)

LORA, IA3, BOTTLENECK, PREFIX, PROMPT = LoraSpec(), Ia3Spec(), BottleneckSpec(), PrefixSpec(), PromptSpec()
RSLORA_ALPHA = 8.0  # scales as the default does at the default rank: 8 / sqrt(16) = 2
Target = TypeVar("Target", bound=str)


def in_order(named: list[Target] | tuple[Target, ...]) -> tuple[Target, ...]:
    """As the forward comes by them, so that equal choices are equal jobs."""
    return tuple(sorted(named, key=[str(target) for target in LORA_TARGETS].index))


class Targets(Body):
    """Modules are named once."""

    @field_validator("target_modules", "feedforward_modules", check_fields=False)
    @classmethod
    def each_once(cls, targets: Any) -> Any:
        if isinstance(targets, list) and len(set(targets)) != len(targets):
            raise ValueError("a module is named twice")
        return targets


class LoraOptions(Targets):
    type: Literal["lora"] = "lora"
    rank: int = Field(default=LORA.rank, ge=1, le=MAX_RANK)
    alpha: Number | None = Field(default=None, gt=0, le=MAX_SCALE)  # default: twice the rank; rsLoRA's: 8
    use_rslora: bool = LORA.use_rslora
    use_dora: bool = LORA.use_dora
    target_modules: Literal["all-linear"] | Annotated[list[LoraTarget], Field(min_length=1)] = "all-linear"
    dropout: Number = Field(default=LORA.dropout, ge=0, lt=1)

    @field_validator("target_modules")
    @classmethod
    def dora_is_for_linears(
        cls, targets: str | list[LoraTarget], info: ValidationInfo
    ) -> str | list[LoraTarget]:
        if info.data.get("use_dora") and set(OUTER_TARGETS) & set(targets):
            raise ValueError(f"use_dora is not for {' or '.join(OUTER_TARGETS)}")
        return targets

    @field_validator("dropout")
    @classmethod
    def dora_has_no_dropout(cls, dropout: float, info: ValidationInfo) -> float:
        if dropout and info.data.get("use_dora"):
            raise ValueError("use_dora is without dropout")
        return dropout

    def spec(self) -> LoraSpec:
        default_alpha = RSLORA_ALPHA if self.use_rslora else 2.0 * self.rank
        named = LINEAR_TARGETS if self.target_modules == "all-linear" else self.target_modules
        return LoraSpec(
            rank=self.rank,
            alpha=default_alpha if self.alpha is None else self.alpha,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            target_modules=in_order(named),
            dropout=self.dropout,
        )


class Ia3Options(Targets):
    type: Literal["ia3"]
    target_modules: list[LinearTarget] = Field(default=list(IA3.target_modules), min_length=1)
    feedforward_modules: list[FeedforwardTarget] | None = None  # default: down_proj, if it is a target

    @field_validator("feedforward_modules")
    @classmethod
    def are_targets(
        cls, named: list[FeedforwardTarget] | None, info: ValidationInfo
    ) -> list[FeedforwardTarget] | None:
        missing = set(named or ()) - set(info.data.get("target_modules", named or ()))
        if missing:
            raise ValueError(f"{min(missing)} is not among the target_modules")
        return named

    def spec(self) -> Ia3Spec:
        usual = [name for name in IA3.feedforward_modules if name in self.target_modules]
        named = usual if self.feedforward_modules is None else self.feedforward_modules
        return Ia3Spec(target_modules=in_order(self.target_modules), feedforward_modules=in_order(named))


class BottleneckOptions(Targets):
    type: Literal["bottleneck"]
    size: int = Field(default=BOTTLENECK.size, ge=1, le=MAX_BOTTLENECK)
    target_modules: list[LinearTarget] = Field(default=list(BOTTLENECK.target_modules), min_length=1)
    activation: Activation = BOTTLENECK.activation
    scaling: Number = Field(default=BOTTLENECK.scaling, gt=0, le=MAX_SCALE)
    parallel: bool = BOTTLENECK.parallel

    def spec(self) -> BottleneckSpec:
        return BottleneckSpec(
            size=self.size,
            target_modules=in_order(self.target_modules),
            activation=self.activation,
            scaling=self.scaling,
            parallel=self.parallel,
        )


class PrefixOptions(Body):
    type: Literal["prefix_tuning"]
    num_virtual_tokens: int = Field(default=PREFIX.num_virtual_tokens, ge=1, le=MAX_VIRTUAL_TOKENS)

    def spec(self) -> PrefixSpec:
        return PrefixSpec(num_virtual_tokens=self.num_virtual_tokens)


class PromptOptions(Body):
    type: Literal["prompt_tuning"]
    num_virtual_tokens: int = Field(default=PROMPT.num_virtual_tokens, ge=1, le=MAX_VIRTUAL_TOKENS)

    def spec(self) -> PromptSpec:
        return PromptSpec(num_virtual_tokens=self.num_virtual_tokens)


def lora_by_default(options: Any) -> Any:
    return {"type": "lora"} | options if isinstance(options, dict) else options


PeftOptions = Annotated[
    Annotated[
        LoraOptions | Ia3Options | BottleneckOptions | PrefixOptions | PromptOptions,
        Field(discriminator="type"),
    ],
    BeforeValidator(lora_by_default),
]
