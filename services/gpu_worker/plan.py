"""What a plan says of finetuning a model by a method: what is kept, what it costs and how bypasses are sharded.

Bytes and FLOPs are of the whole model unless a name says otherwise; `services/gpu_worker/planner.py` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from services.gpu_worker.compiler.parallelize import BypassPlan
from services.gpu_worker.compiler.plan import TensorPlan
from services.gpu_worker.dry_run import Form, SequenceBytes
from services.gpu_worker.dry_window import WindowBytes
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.kernels.backend import KernelChoice
from services.gpu_worker.model.peft import Method
from services.gpu_worker.savings import Flops, Step


@dataclass(frozen=True, slots=True)
class Request:
    model: str  # as its user calls it
    hf_config: dict[str, Any]  # its config.json
    method: Method
    dtype: torch.dtype = torch.bfloat16
    sequence_tokens: int = 8192  # virtual ones included
    window_tokens: int = SchedulerConfig().finetune_window  # a worker's largest
    tensor_parallel: int = 1
    hardware: str = "h200"
    quantise: Form = "none"
    budget_bytes: int | None = None  # of a sequence's activations on a rank, keys and values not included
    dropout: float = 0.0
    kernels: KernelChoice = "auto"  # of the hardware: Triton's on a GPU


@dataclass(frozen=True, slots=True)
class Operations:
    """Of one layer's backward."""

    before_pruning: int
    after_pruning: int
    after_pruning_in_first_layer: int


@dataclass(frozen=True, slots=True)
class PolicyPlan:
    name: str
    bytes_per_token_layer: float  # keys and values included
    rank_bytes_per_token_layer: float
    sequence_bytes: float  # all layers
    extra_flops_per_token: float
    extra_flops_percent: float
    num_layers: int  # for which it is chosen


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Of one training sequence, in the chosen policies."""

    activation_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    sequence: SequenceBytes
    window: WindowBytes

    @property
    def peak_bytes(self) -> int:
        return self.activation_bytes + self.kv_bytes + self.sequence.total + self.window.peak


@dataclass(frozen=True, slots=True)
class WeightPlan:
    bytes_by_form: dict[Form, int]  # a form that cannot hold the model is missing
    second_layout_bytes: int  # oneDNN's, on a CPU
    perplexity_by_form: dict[Form, float]  # measured; empty where no texts were given


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    num_parameters: int
    weight_bytes: int  # as they are computed with, in the model's dtype
    gradient_bytes: int
    optimizer_bytes: int  # float32 masters and AdamW's two moments

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True)
class CandidatePlan:
    site: str
    targets: tuple[str, ...]
    name: str
    is_chosen: bool  # the cheapest, which is what ranks execute
    forward_collectives: tuple[str, ...]
    backward_collectives: tuple[str, ...]
    step_collectives: tuple[str, ...]
    cost_us_per_iteration: float
    trainable_bytes_per_rank: int  # with gradients and the optimizer's state


def candidate_plans(bypass: BypassPlan) -> list[CandidatePlan]:
    return [
        CandidatePlan(
            site=bypass.site.name,
            targets=bypass.site.targets,
            name=candidate.name,
            is_chosen=candidate is bypass.chosen,
            forward_collectives=tuple(map(str, candidate.forward_collectives)),
            backward_collectives=tuple(map(str, candidate.backward_collectives)),
            step_collectives=tuple(f"{step.collective} of {step.subject}" for step in candidate.steps),
            cost_us_per_iteration=candidate.cost_us,
            trainable_bytes_per_rank=candidate.weight_bytes,
        )
        for candidate in bypass.candidates
    ]


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one of the ranks that share the model holds."""

    weight_bytes: int
    second_layout_bytes: int
    adapter: AdapterPlan
    memory: MemoryPlan


@dataclass(frozen=True, slots=True)
class Plan:
    request: Request
    num_layers: int
    tensors: list[TensorPlan]
    operations: Operations
    flops: Flops
    policies: list[PolicyPlan]
    extra_flops_percent: float  # of the chosen policies
    fits_budget: bool | None  # None: there is none
    memory: MemoryPlan
    weights: WeightPlan
    adapter: AdapterPlan
    baselines: list[Step]
    baseline_problem: str | None
    ablation: list[Step]
    parallel: list[CandidatePlan]
    rank: RankPlan | None  # None: the model is not shared
