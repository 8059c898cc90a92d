"""The wire: everything that one process of FlexLLM says to another.

Three channels carry these messages. The API puts a `GenerateRequest` on the inference queue and reads
`Frame`s back; the finetune queue carries job ids only; the worker claims, beats, commits and publishes jobs
by HTTP through the adapter store (`JobLease` ... `PublishReply`). Unknown fields are ignored and missing ones
have defaults, so that an old and a new process understand each other during a rolling update.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.peft import LoraSpec, PeftSpec
from shared.service_levels import Tier

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Message(BaseModel):
    """Immutable, and tolerant of a peer that is a version ahead."""

    model_config = ConfigDict(frozen=True, extra="ignore")


# --- inference -------------------------------------------------------------------------------------------


class AdapterRef(Message):
    """Immutable pointer to one adapter version; a request keeps it from admission to its end."""

    version_id: str
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")  # content hash: `content_digest` of its files
    num_virtual_tokens: int = Field(default=0, ge=0)  # positions that it takes in front of the prompt

    @property
    def prefix(self) -> str:
        return adapter_prefix(self.digest)


class SamplingParams(Message):
    """How the next token is drawn. Bounds here are the engine's own; the API refuses earlier, with words."""

    max_tokens: int = Field(default=16, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)  # 0: greedy
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)  # 0: all
    min_p: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10, allow_inf_nan=False)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0, lt=2**63)  # the API draws one where the client gave none
    stop_token_ids: tuple[int, ...] = ()  # ending tokens; the stop token itself is not emitted
    ignore_eos: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)  # how many alternatives beside the chosen token
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)


class GenerateRequest(Message):
    """One sequence to continue. `n` choices are `n` requests that share a prompt."""

    request_id: str
    tenant_id: str
    prompt: tuple[int, ...] = Field(min_length=1)
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    cache_salt: str = ""  # made by the server from the tenant; seeds the prefix cache's hash chain
    service_tier: Tier = "default"
    deadline_s: float = 600.0  # give up this long after the enqueue


class TokenLogprob(Message):
    """Natural-log probability of a token under the unmodified model, and of the `top` alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class RequestMeta(Message):
    """What the worker knows of a request beyond its tokens; sent once, with the first frame."""

    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # first is null


class Frame(Message):
    """Tokens `from_seq ...` of one request. Exactly one frame of a request has `finish` set."""

    request_id: str
    attempt: int = 0  # fence of the worker that computed it
    from_seq: int
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    error: str | None = None  # with finish == "error": code, such as "poisoned", "adapter_load_failed"
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token, where asked for
    meta: RequestMeta | None = None


class TierAttainment(Message):
    """Requests of one tier that are over, since the worker's start: how many met each target of the tier, and the
    sums of what they took. A request of a single token has no time between tokens.
    """

    ttft_slo_ms: float = 0.0  # the targets
    tpot_slo_ms: float = 0.0
    ttft_met: int = 0
    ttft_missed: int = 0
    ttft_ms_sum: float = 0.0  # to the first token, the wait in the queue included
    tpot_met: int = 0
    tpot_missed: int = 0
    tpot_ms_sum: float = 0.0  # mean time between a request's tokens


class WorkerStatus(Message):
    """What a worker says of itself at every beat."""

    worker_id: str
    model: str = ""
    draining: bool = False
    progress_age_s: float = 0.0  # since it was last idle or finished a step; the reader adds the report's age
    uptime_s: float = 0.0  # since the model was loaded; the reader adds the report's age
    engine_steps: int = 0
    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    memory_bytes: dict[str, int] = Field(default_factory=dict)  # of the device, by owner
    host_memory_bytes: dict[str, int] = Field(default_factory=dict)  # moved out of the device's memory
    memory_limit_bytes: int = 0  # all that the device has
    memory_statistics: dict[str, int] = Field(
        default_factory=dict
    )  # planned, held; of a GPU's pool what it counts
    training_jobs: tuple[str, ...] = ()
    finetune_tokens_per_s: float = 0.0  # tokens whose forward and backward are done
    inference_tokens_per_s: float = 0.0
    finetune_tokens: float = 0.0  # since the worker's start
    inference_tokens: int = 0
    latency_error_p50: float = 0.0  # |actual / expected - 1| of the last iterations' time
    latency_error_p95: float = 0.0
    latency_exceeded: float = 0.0  # share of them that took longer than the scheduler had planned
    service_levels: dict[str, TierAttainment] = Field(default_factory=dict)  # by tier


# --- finetuning ------------------------------------------------------------------------------------------


class TrainSpec(Message):
    """Everything that decides what a job computes. With the dataset and the base model it is reproducible."""

    peft: PeftSpec = LoraSpec()
    n_epochs: int = Field(default=3, ge=1, le=50)
    batch_size: int = Field(default=8, ge=1, le=256)  # examples of one forward-backward
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=256)
    learning_rate: float = Field(default=2e-4, gt=0, le=10, allow_inf_nan=False)
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)  # 0: no clipping
    max_seq_len: int = Field(default=1024, ge=8)
    seed: int = Field(default=0, ge=0, lt=2**31)
    eval_every_steps: int = Field(default=0, ge=0)  # 0: at the start, each epoch's end and the end
    max_steps: int = Field(default=0, ge=0)  # 0: as many as the epochs give


class DatasetRef(Message):
    """Tokenised examples in object storage (see `shared.dataset`)."""

    key: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_examples: int = Field(ge=1)
    num_tokens: int = Field(ge=1)
    num_trained_tokens: int = Field(ge=1)  # tokens with a label


class CheckpointRef(Message):
    """A committed checkpoint. Its manifest maps file names to sizes and digests."""

    checkpoint_id: str
    step: int = Field(ge=0)
    manifest_key: str
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class JobLease(Message):
    """A worker's right to run one job, until `lease_s` passes without a beat or the fence moves on."""

    job_id: str
    tenant_id: str
    tenant_weight: float = Field(default=1.0, gt=0)
    fence: int = Field(ge=1)
    lease_s: float
    base_model: str
    spec: TrainSpec
    training: DatasetRef
    validation: DatasetRef | None = None
    checkpoints: tuple[CheckpointRef, ...] = ()  # committed ones, newest first; resume from the first sound


class ClaimRequest(Message):
    worker_id: str
    base_model: str
    base_digest: str


class StepMetrics(Message):
    """One optimizer step, or an evaluation (`valid_loss` set) after it. Losses are means over labelled tokens."""

    step: int = Field(ge=0)
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    num_tokens: int = 0  # tokens of the step, forward and backward done
    tokens_per_s: float | None = None  # since the last step, waiting included


class JobMessage(Message):
    level: Literal["info", "warn", "error"] = "info"
    message: str = Field(max_length=2000)


class BeatRequest(Message):
    """Renews the lease and reports progress. Metrics of a step already reported are replaced."""

    fence: int
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    trained_tokens: int = Field(default=0, ge=0)
    eta_s: float | None = None
    metrics: tuple[StepMetrics, ...] = ()
    messages: tuple[JobMessage, ...] = ()


class BeatReply(Message):
    cancel_requested: bool = False
    pause_requested: bool = False


class CommitCheckpoint(Message):
    """All files and the manifest are in object storage; make the checkpoint the one to resume from."""

    fence: int
    checkpoint_id: str
    step: int = Field(ge=0)
    manifest_key: str
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    metrics: StepMetrics | None = None


class PublishRequest(Message):
    """The adapter's files are in object storage under `adapter_prefix(digest)`; make them a version."""

    fence: int
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    files: dict[str, str]  # name -> sha256
    size_bytes: int = Field(ge=1)
    base_digest: str
    trained_tokens: int = Field(ge=0)
    metrics: dict[str, float] = Field(default_factory=dict)


class PublishReply(Message):
    version_id: str
    version: int
    model: str  # the name under which the version is served


class EndJob(Message):
    """The worker gives a job up: back to the queue, paused, cancelled, or failed with a code and words."""

    fence: int
    outcome: Literal["released", "paused", "cancelled", "failed"]
    code: str | None = None
    message: str | None = Field(default=None, max_length=2000)


# --- names and digests -----------------------------------------------------------------------------------

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def content_digest(files: dict[str, str]) -> str:
    """Identity of a set of files: sha256 over their sorted (name, sha256) pairs as compact JSON."""
    text = json.dumps(sorted(files.items()), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def adapter_prefix(digest: str) -> str:
    """Where the files of the adapter version with this digest lie in object storage."""
    return f"adapters/sha256/{digest[:2]}/{digest}"


def checkpoint_prefix(job_id: str, fence: int, step: int) -> str:
    """Where one checkpoint's files lie; the fence keeps a zombie's writes apart from its successor's."""
    return f"checkpoints/{job_id}/{fence}-{step}"
