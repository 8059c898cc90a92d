"""How a customer says which PEFT method a job trains: one message a method, told apart by `type`.

Bounds here are the platform's own. What a method computes stands in the worker.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LinearTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEAR_TARGETS: tuple[LinearTarget, ...] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
OuterTarget = Literal["embed_tokens", "lm_head"]
OUTER_TARGETS: tuple[OuterTarget, ...] = ("embed_tokens", "lm_head")
LoraTarget = Literal[LinearTarget, OuterTarget]
LORA_TARGETS: tuple[LoraTarget, ...] = (*LINEAR_TARGETS, *OUTER_TARGETS)
FeedforwardTarget = Literal["o_proj", "down_proj"]  # linears whose input no other linear reads
Activation = Literal["relu", "gelu", "silu", "tanh"]

MAX_RANK = 128
MAX_SCALE = 1024  # of LoRA's alpha and a bottleneck's scaling
MAX_BOTTLENECK = 1024
MAX_VIRTUAL_TOKENS = 512


class MethodSpec(BaseModel):
    """Immutable, and tolerant of a peer that is a version ahead."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LayerSpec(MethodSpec):
    """A method on the model's linears. It takes no position of the sequence."""

    @property
    def num_virtual_tokens(self) -> int:
        return 0


class LoraSpec(LayerSpec):
    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=MAX_RANK)
    alpha: float = Field(default=32.0, gt=0, le=MAX_SCALE, allow_inf_nan=False)
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: tuple[LoraTarget, ...] = Field(default=LINEAR_TARGETS, min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def dora_is_for_linears_without_dropout(self) -> Self:
        if self.use_dora and self.dropout:
            raise ValueError("dropout has to be 0 with use_dora")
        if self.use_dora and set(OUTER_TARGETS) & set(self.target_modules):
            raise ValueError(f"use_dora is not for {' or '.join(OUTER_TARGETS)}")
        return self


class Ia3Spec(LayerSpec):
    """`feedforward_modules` are the targets whose input is scaled; of the others it is the output."""

    type: Literal["ia3"] = "ia3"
    target_modules: tuple[LinearTarget, ...] = Field(default=("k_proj", "v_proj", "down_proj"), min_length=1)
    feedforward_modules: tuple[FeedforwardTarget, ...] = ("down_proj",)

    @model_validator(mode="after")
    def feedforward_modules_are_targets(self) -> Self:
        if not set(self.feedforward_modules) <= set(self.target_modules):
            raise ValueError("every feedforward module has to be a target module too")
        return self


class BottleneckSpec(LayerSpec):
    """`parallel`: reads the targets' input rather than their output."""

    type: Literal["bottleneck"] = "bottleneck"
    size: int = Field(default=64, ge=1, le=MAX_BOTTLENECK)
    target_modules: tuple[LinearTarget, ...] = Field(default=("o_proj", "down_proj"), min_length=1)
    activation: Activation = "relu"
    scaling: float = Field(default=1.0, gt=0, le=MAX_SCALE, allow_inf_nan=False)
    parallel: bool = False


class VirtualTokenSpec(MethodSpec):
    """A method in front of the sequence, in positions that the sequence's own tokens cannot have."""

    num_virtual_tokens: int = Field(default=16, ge=1, le=MAX_VIRTUAL_TOKENS)


class PrefixSpec(VirtualTokenSpec):
    type: Literal["prefix_tuning"] = "prefix_tuning"


class PromptSpec(VirtualTokenSpec):
    type: Literal["prompt_tuning"] = "prompt_tuning"


PeftSpec = Annotated[
    LoraSpec | Ia3Spec | BottleneckSpec | PrefixSpec | PromptSpec, Field(discriminator="type")
]
