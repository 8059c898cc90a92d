"""Every setting of every service: frozen, typed, read once from `FLEXLLM_*` environment variables.

Nothing else in the project reads the environment.
"""

from __future__ import annotations

import os
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.service_levels import ServiceLevel, Tier

Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """One flat namespace; each service reads the part that it needs. Units stand in the names."""

    model_config = SettingsConfigDict(env_prefix="FLEXLLM_", frozen=True, extra="ignore")

    # Where the state lives
    database_url: str = "postgresql+psycopg://flexllm:flexllm@127.0.0.1:5432/flexllm"
    redis_url: str = "redis://127.0.0.1:6379/0"
    celery_broker_url: str = "redis://127.0.0.1:6379/1"
    object_store_url: str = "file:///tmp/flexllm/objects"  # file:///path or s3://bucket[/prefix]
    s3_endpoint: str | None = None
    s3_region: str = "us-east-1"
    s3_access_key_id: SecretStr | None = None
    s3_secret_access_key: SecretStr | None = None
    spool_dir: Path = Path("/tmp/flexllm/spool")  # uploads on their way to the object store

    # Who talks to whom
    api_host: str = "127.0.0.1"
    api_port: int = 8000
    store_host: str = "127.0.0.1"
    store_port: int = 8001
    adapter_store_url: str = "http://127.0.0.1:8001"
    internal_token: SecretStr = SecretStr("")  # worker -> adapter store; refused when empty
    key_pepper: SecretStr = SecretStr("")  # HMAC key of the API key hashes; refused when empty
    admin_password: SecretStr = SecretStr("")  # admin UI; the UI refuses to start without one
    session_secret: SecretStr = SecretStr("")  # signs admin sessions; refused when empty

    # The model
    model_dir: Path = Path(".flexllm/models/SmolLM2-135M-Instruct")
    served_model_name: str | None = None  # default: the model folder's name
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    quantise: Literal["none", "int8", "int4"] = "none"  # form of the layers' frozen weights
    int4_group_size: int = Field(default=32, ge=1)  # weights of a row that share a scale in int4
    num_threads: int = Field(default=0, ge=0)  # CPU threads of the engine, on each rank; 0: all cores
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: Triton's on a GPU, torch's elsewhere
    cuda_graphs: bool = True  # forwards over decodes alone are recorded and replayed; on a GPU, one rank
    lanes: bool = True  # two halves of a CPU's threads may work at once: one serves while the other trains
    async_scheduling: bool | None = None  # launch an iteration while the one before computes; unset: on a GPU
    backward_stream: Literal["auto", "on", "off"] = "auto"  # training beside decodes; auto: where a GPU gains
    profile_dir: str = ".flexllm/profiles"  # of measured iteration times; empty: none are kept
    tensor_parallel: int = Field(default=1, ge=1)  # ranks that share the model: GPUs, or processes on CPUs

    # Engine limits
    max_model_len: int = Field(default=2048, ge=16)
    max_num_seqs: int = Field(default=16, ge=1)  # running sequences
    max_num_batched_tokens: int = Field(default=512, ge=16)  # tokens of one fused forward
    kv_cache_bytes: int = Field(default=0, ge=0)  # on each rank; 0: chosen from the free memory
    block_size: int = Field(default=16, ge=1)
    max_adapters: int = Field(default=16, ge=1)  # adapters resident on the device
    max_lora_rank: int = Field(default=128, ge=1)
    max_finetune_jobs: int = Field(default=4, ge=0)  # jobs in training at once on one worker
    finetune_window: int = Field(default=1024, ge=1)  # largest window, tokens
    # who gets the iterations; all but coserve are there to be compared with
    sharing: Literal["coserve", "inference-only", "finetune-only", "temporal", "temporal-dynamic"] = "coserve"
    sharing_period: int = Field(default=64, ge=1)  # of temporal sharing, in iterations of inference
    finetune_tokens_in_flight: int = Field(default=2048, ge=16)  # tokens of one packed training sequence
    finetune_bytes: int = Field(default=0, ge=0)  # that all jobs may hold; 0: a share of what serving leaves
    activation_bytes: int = Field(default=0, ge=0)  # that one job keeps if it can; 0: its part of these
    offload_activations: Literal["auto", "always", "never"] = "auto"  # to the host; auto: what does not fit

    # Service levels
    tpot_slo_ms: Milliseconds = Field(default=150.0, gt=0)  # mean time between tokens; of the default tier
    ttft_slo_ms: Milliseconds = Field(default=2000.0, gt=0)  # to the first token, the queue included
    tpot_slo_priority_ms: Milliseconds = 0.0  # 0: a third of the default tier's
    ttft_slo_priority_ms: Milliseconds = 0.0  # 0: a third of the default tier's
    tpot_slo_flex_ms: Milliseconds = 0.0  # 0: eight times the default tier's
    ttft_slo_flex_ms: Milliseconds = 0.0  # 0: eight times the default tier's

    # Queue protocol timers
    lease_s: float = 15.0
    beat_s: float = 1.0  # a worker's leases and its report
    reap_s: float = 5.0
    worker_ttl_s: float = 30.0
    api_ttl_s: float = 10.0
    owner_no_progress_s: float = 20.0
    queue_wait_s: float = 30.0
    request_deadline_s: float = 600.0
    max_queue_depth: int = 1024
    max_sequences_per_tenant: int = Field(default=256, ge=1)  # in flight, in one process of the API
    drain_s: float = 20.0

    # Jobs
    job_lease_s: float = 60.0
    job_beat_s: float = 2.0  # also how often metrics reach the registry
    checkpoint_every_steps: int = 50
    checkpoint_every_s: float = 120.0
    checkpoints_kept: int = 2
    max_file_bytes: int = 512 * 1024 * 1024
    min_training_examples: int = Field(default=10, ge=1)
    dispatch_s: float = 0.5  # how often the store sends what was committed and looks for lost workers
    sweep_s: float = 30.0  # how often background work that was lost is sent again
    objects_kept_s: float = 24 * 3600.0  # before an object without a row is removed

    @cached_property
    def model_id(self) -> str:
        """The base model's name on the API."""
        return self.served_model_name or self.model_dir.name

    @property
    def service_levels(self) -> dict[Tier, ServiceLevel]:
        """Strictest first."""
        default = ServiceLevel(self.tpot_slo_ms, self.ttft_slo_ms)
        return {
            "priority": ServiceLevel(
                self.tpot_slo_priority_ms or default.tpot_ms / 3,
                self.ttft_slo_priority_ms or default.ttft_ms / 3,
            ),
            "default": default,
            "flex": ServiceLevel(
                self.tpot_slo_flex_ms or default.tpot_ms * 8,
                self.ttft_slo_flex_ms or default.ttft_ms * 8,
            ),
        }

    @model_validator(mode="after")
    def stricter_tiers_are_promised_more(self) -> Self:
        levels = self.service_levels
        for strict, loose in pairwise(levels):
            for name, least, most in zip(ServiceLevel._fields, levels[strict], levels[loose], strict=True):
                if least > most:
                    target = name.removesuffix("_ms").upper()
                    raise ValueError(
                        f"the {target} target of {strict}, {least:g} ms, exceeds that of {loose}, {most:g} ms: "
                        f"set FLEXLLM_{target}_SLO_* so that priority <= default <= flex"
                    )
        return self

    @property
    def sync_database_url(self) -> str:
        return self.database_url


def child_environment(settings: Settings) -> dict[str, str]:
    """Our own environment, changed so that a child process reads the same settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("FLEXLLM_")}
    return own | {
        f"FLEXLLM_{name.upper()}": value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        for name, value in settings
        if value is not None
    }
