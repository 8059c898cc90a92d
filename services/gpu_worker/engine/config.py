"""What an engine is made of, and what a configuration means on a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from services.gpu_worker.engine.admission import Offload
from services.gpu_worker.engine.interference import BackwardStream
from services.gpu_worker.engine.latency import LatencyModel
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.slo import DEFAULT_SLO, DEFAULT_TIER, SLO
from services.gpu_worker.kernels.backend import KernelChoice
from services.gpu_worker.kernels.linear import DenseLinear
from services.gpu_worker.kernels.quantised import GROUP_SIZE, quantise
from services.gpu_worker.model.weights import MakeLinear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model_dir: Path
    device: str = "auto"
    dtype: str = "auto"
    num_threads: int = 0  # 0: all cores
    kernels: KernelChoice = "auto"  # auto: Triton's on a GPU, torch's elsewhere
    cuda_graphs: bool = True  # forwards over decodes alone are recorded; with Triton's kernels on a GPU
    lanes: bool = True  # two halves of a CPU's threads may work at once
    async_scheduling: bool | None = None  # launch an iteration while the one before computes; None: on a GPU
    backward_stream: BackwardStream = "auto"  # training beside decodes; auto: where a GPU gains by it
    quantise: Literal["none", "int8", "int4"] = "none"  # the layers' linears; embedding and head stay dense
    int4_group_size: int = GROUP_SIZE  # inputs that share a scale
    block_size: int = 16
    kv_cache_bytes: int = 0  # 0: a share of the free memory
    max_adapters: int = 16
    max_lora_rank: int = 128
    max_finetune_jobs: int = 4
    finetune_tokens_in_flight: int = 2048
    finetune_bytes: int = 0  # of all jobs together; 0: a share of what weights, cache and adapters leave
    activation_bytes: int = 0  # that one job keeps if it can; 0: its part of these
    offload_activations: Offload = "auto"  # to host memory; auto: what a GPU has no room for
    slos: Mapping[str, SLO] = field(default_factory=lambda: {DEFAULT_TIER: DEFAULT_SLO})  # by tier
    profile_dir: Path | None = None  # keeps latency profiles from one start to the next; None: none is kept
    latency: LatencyModel | None = (
        None  # known already; None: measured at the start, or kept from an earlier one
    )
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        if DEFAULT_TIER not in self.slos:
            raise ValueError(f"slos: there is no tier {DEFAULT_TIER!r} among {sorted(self.slos)}")


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16, which both GPUs and CPUs with AVX512-BF16 or AMX compute fast; else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def is_asynchronous(config: EngineConfig, device: torch.device, num_ranks: int) -> bool:
    """Whether iterations are launched ahead; raises ValueError where the config asks for what cannot be."""
    if config.async_scheduling and num_ranks > 1:
        raise ValueError(
            f"async_scheduling: {num_ranks} ranks that share a model schedule in step with each other, one iteration "
            "after the other: leave it out or set it to false"
        )
    if config.async_scheduling is not None:
        return config.async_scheduling
    return device.type == "cuda" and num_ranks == 1


def may_use_side_stream(config: EngineConfig, device: torch.device, num_ranks: int) -> bool:
    """Whether a backward may run beside decodes; raises ValueError where the config asks for what cannot be."""
    possible = device.type == "cuda" and num_ranks == 1
    if config.backward_stream == "on" and not possible:
        raise ValueError(
            f"backward_stream 'on': a second stream is for a GPU that one rank has to itself, not for {num_ranks} "
            f"rank(s) on {device.type}: leave it out or set it to off"
        )
    return possible and config.backward_stream != "off"


def make_linear(config: EngineConfig) -> MakeLinear:
    if config.quantise == "none":
        return DenseLinear
    return partial(quantise, scheme=config.quantise, group_size=config.int4_group_size)
