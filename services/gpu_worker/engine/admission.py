"""Shares out among jobs what finetuning may hold of the memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from services.gpu_worker.compiler.layout import choose_layout
from services.gpu_worker.compiler.programs import CompiledMethod
from services.gpu_worker.engine.latency import LatencyModel
from services.gpu_worker.engine.memory import finetune_bytes, free_bytes
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.memory import (
    JobPlan,
    JobPlanner,
    Moves,
    Room,
    TooLarge,
    mib,
    parameter_bytes,
)
from services.gpu_worker.finetune.packing import Examples
from services.gpu_worker.finetune.policies import LayerPolicies, fit
from services.gpu_worker.model.adapter_stack import most_copies
from services.gpu_worker.model.peft import LoraConfig, Method, projections
from services.gpu_worker.model.weights import ModelWeights

Offload = Literal["auto", "always", "never"]
HOST = torch.device("cpu")
HOST_SHARE = 0.25  # of the host memory that is free when a job comes
USUAL_RANK = 16  # of adapters and jobs before any has come


class JobMustWait(ValueError):
    """The job fits, but not beside those that run."""


@dataclass(slots=True)
class Admission:
    """Each job aims at an equal part of what is left, by what it keeps; it gets more where it needs more.

    A job's bytes are reserved at their most for as long as it is here, so that none that has begun fails for
    another's sake.
    """

    weights: ModelWeights
    max_jobs: int
    max_tokens: int  # of a training sequence
    max_rank: int
    offload: Offload
    activation_bytes: int = 0  # that one job aims at; 0: its part of the budget
    num_lanes: int = 1  # that may work on a job at once
    grain: int = 1  # of training sequences, tokens
    budget: int = 0  # bytes of the device
    step_flops: float = math.inf  # of a token in one layer's backward, that the service level has time for
    is_full: bool = False  # a job did not fit beside those that are here; until one of them leaves
    _plans: dict[str, JobPlan] = field(default_factory=dict)

    def set_budget(self, num_bytes: int, left: int, max_adapters: int) -> None:
        """`num_bytes` of the device, or where it is 0 a share of what weights and cache have left and adapters
        do not need."""
        copies = 1 + most_copies(self.weights.device, self.weights.dtype)
        adapters = max_adapters * copies * self._usual_bytes
        self.budget = num_bytes or finetune_bytes(self.weights.device, left - adapters)

    def set_pace(self, policies: LayerPolicies, latency: LatencyModel, window: int, slack_ms: float) -> None:
        """A smallest window's backward through one layer should fit into the slack that decodes leave; `latency`
        was measured with `policies`."""
        self.step_flops = policies.step_flops * max(0.0, slack_ms) / latency.backward(window)

    @property
    def _usual_bytes(self) -> int:
        layout = choose_layout(self.weights, self._usual_method)
        return parameter_bytes(self.weights, self._usual_method, layout).trainable

    @property
    def _usual_method(self) -> LoraConfig:
        rank = min(USUAL_RANK, self.max_rank)
        return LoraConfig(rank, rank, tuple(projections(self.weights.config)))

    def usual_policies(self) -> LayerPolicies:
        """Of a job with its part of the memory."""
        num_bytes = self.activation_bytes or self._aim
        return fit(self.compile(self._usual_method), num_bytes / self.max_tokens)

    def compile(self, method: Method, dropout: bool = False) -> CompiledMethod:
        return CompiledMethod(
            self.weights.whole,
            method,
            dtype=self.weights.dtype,
            sequence_length=self.max_tokens,
            dropout=dropout,
            layout=choose_layout(self.weights, method),
            kernels=self.weights.kernels,
        )

    @property
    def _aim(self) -> int:
        return self._left // max(1, self.max_jobs - len(self._plans))

    @property
    def _left(self) -> int:
        return self.budget - self.planned_bytes

    @property
    def planned_bytes(self) -> int:
        """That jobs may come to hold on the device."""
        return sum(plan.memory.device_bytes for plan in self._plans.values())

    @property
    def can_move(self) -> bool:
        """Whether activations can leave the device. On a CPU that saves nothing: it happens only if told to."""
        return self.offload == "always" or (self.offload == "auto" and self.weights.device != HOST)

    def _room(self) -> Room:
        if self.offload == "never":
            return Room(self._aim, self._left, self.activation_bytes, step_flops=self.step_flops)
        reserved = sum(plan.memory.host_bytes for plan in self._plans.values())
        free = self.weights.group.least(free_bytes(HOST)) // self.weights.group.size
        host = max(0, int(free * HOST_SHARE) - reserved)
        moves: Moves = "always" if self.offload == "always" else "at need" if self.can_move else "never"
        return Room(self._aim, self._left, self.activation_bytes, host, moves, self.step_flops)

    def find_plan(
        self, method: Method, config: JobConfig, training: Examples, validation: Examples | None
    ) -> JobPlan:
        """Raises TooLarge where the job never fits, JobMustWait where it does once others have ended."""
        compiled = self.compile(method, config.lora_dropout > 0)
        planner = JobPlanner(self.weights, compiled, config, training, validation, self.num_lanes, self.grain)
        room = self._room()
        try:
            return planner.plan(self.max_tokens, room)
        except TooLarge:
            self._check_alone(planner, room)
            self.is_full = True
            taken = f"{len(self._plans)} jobs leave {mib(self._left)} of finetuning's {mib(self.budget)}"
            raise JobMustWait(taken) from None

    def _check_alone(self, planner: JobPlanner, room: Room) -> None:
        try:
            planner.plan(self.max_tokens, replace(room, most=self.budget))
        except TooLarge as error:
            raise TooLarge(
                f"{error}: raise finetune_bytes (or leave more to it by a lower kv_cache_bytes or "
                f"max_adapters), or train fewer parameters on shorter examples"
            ) from error

    def plan_of(self, job_id: str) -> JobPlan:
        return self._plans[job_id]

    def reserve(self, job_id: str, plan: JobPlan) -> None:
        self._plans[job_id] = plan

    def release(self, job_id: str) -> None:
        self._plans.pop(job_id, None)
        self.is_full = False
