"""POST /v1/fine_tuning/jobs. What OpenAI's schema lacks travels in the object `flexllm`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from services.api.schemas.fields import Body, Metadata, Number
from shared.messages import LORA_TARGETS, LoraSpec, LoraTarget, TrainSpec

DEFAULTS = TrainSpec()
Auto = Literal["auto"]


class Hyperparameters(Body):
    """As the official API names them; "auto" is our default."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[Number, Field(gt=0, le=1000)] = "auto"


class Supervised(Body):
    hyperparameters: Hyperparameters | None = None


class Method(Body):
    type: Literal["supervised"]  # the only method offered
    supervised: Supervised | None = None


class PeftOptions(Body):
    """The shape of the adapter."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=DEFAULTS.peft.rank, ge=1, le=128)
    alpha: Number | None = Field(default=None, gt=0, le=1024)  # default: twice the rank
    target_modules: Literal["all-linear"] | Annotated[list[LoraTarget], Field(min_length=1)] = "all-linear"
    dropout: Number = Field(default=DEFAULTS.peft.dropout, ge=0, lt=1)

    @field_validator("target_modules")
    @classmethod
    def each_once(cls, targets: str | list[LoraTarget]) -> str | list[LoraTarget]:
        if isinstance(targets, list) and len(set(targets)) != len(targets):
            raise ValueError("a module is named twice")
        return targets

    def spec(self) -> LoraSpec:
        named = LORA_TARGETS if self.target_modules == "all-linear" else self.target_modules
        return LoraSpec(
            rank=self.rank,
            alpha=2.0 * self.rank if self.alpha is None else self.alpha,
            target_modules=tuple(target for target in LORA_TARGETS if target in named),
            dropout=self.dropout,
        )


class Extension(Body):
    """Everything that decides what a job computes and OpenAI's hyperparameters do not say."""

    peft: PeftOptions | None = None
    learning_rate: Number | None = Field(default=None, gt=0, le=1)
    lr_schedule: Literal["cosine", "linear", "constant"] = DEFAULTS.lr_schedule
    warmup_ratio: Number = Field(default=DEFAULTS.warmup_ratio, ge=0, le=1)
    weight_decay: Number = Field(default=DEFAULTS.weight_decay, ge=0, le=1)
    beta1: Number = Field(default=DEFAULTS.beta1, ge=0, lt=1)
    beta2: Number = Field(default=DEFAULTS.beta2, ge=0, lt=1)
    epsilon: Number = Field(default=DEFAULTS.epsilon, gt=0, le=1)
    max_grad_norm: Number = Field(default=DEFAULTS.max_grad_norm, ge=0, le=1e6)
    gradient_accumulation_steps: int = Field(default=DEFAULTS.gradient_accumulation_steps, ge=1, le=256)
    max_seq_len: int | None = Field(default=None, ge=8, lt=2**31)
    max_steps: int = Field(default=DEFAULTS.max_steps, ge=0, lt=2**31)
    eval_every_steps: int = Field(default=DEFAULTS.eval_every_steps, ge=0, lt=2**31)
    priority: int = Field(
        default=0, ge=-10, le=10
    )  # higher first, among one tenant's and others' queued jobs
    promote: bool = False  # move the adapter's `live` alias to the new version


class CreateJob(Body):
    model: str = Field(min_length=1, max_length=256)
    training_file: str = Field(min_length=1, max_length=64)
    validation_file: str | None = Field(default=None, max_length=64)
    suffix: str | None = Field(default=None, min_length=1, max_length=64)
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None  # the older place
    metadata: Metadata | None = None
    integrations: list[Any] | None = None
    flexllm: Extension | None = None

    @field_validator("integrations")
    @classmethod
    def no_integration(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise ValueError("integrations are not supported; the job's events carry its metrics")
        return value

    @model_validator(mode="after")
    def one_place_for_hyperparameters(self) -> CreateJob:
        if self.hyperparameters is not None and self.method is not None:
            raise ValueError("give hyperparameters within method or beside it, not both")
        return self

    @property
    def chosen(self) -> Hyperparameters:
        within = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        return within or self.hyperparameters or Hyperparameters()
