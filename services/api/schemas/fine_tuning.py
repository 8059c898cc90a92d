"""POST /v1/fine_tuning/jobs. What OpenAI's schema lacks travels in the object `flexllm`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from services.api.schemas.fields import Body, Metadata, Number
from services.api.schemas.peft import PeftOptions
from shared.messages import TrainSpec

DEFAULTS = TrainSpec()
MIN_SEQ_LEN = 8
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


class Extension(Body):
    """Everything that decides what a job computes and OpenAI's hyperparameters do not say."""

    peft: PeftOptions | None = None
    learning_rate: Number | None = Field(default=None, gt=0, le=1)  # default: the method's
    lr_schedule: Literal["cosine", "linear", "constant"] = DEFAULTS.lr_schedule
    warmup_ratio: Number = Field(default=DEFAULTS.warmup_ratio, ge=0, le=1)
    weight_decay: Number = Field(default=DEFAULTS.weight_decay, ge=0, le=1)
    beta1: Number = Field(default=DEFAULTS.beta1, ge=0, lt=1)
    beta2: Number = Field(default=DEFAULTS.beta2, ge=0, lt=1)
    epsilon: Number = Field(default=DEFAULTS.epsilon, gt=0, le=1)
    max_grad_norm: Number = Field(default=DEFAULTS.max_grad_norm, ge=0, le=1e6)
    gradient_accumulation_steps: int = Field(default=DEFAULTS.gradient_accumulation_steps, ge=1, le=256)
    max_seq_len: int | None = Field(default=None, ge=MIN_SEQ_LEN, lt=2**31)  # virtual tokens not counted
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
