"""What one job holds: predicted before it starts, by which it is admitted, and measured while it runs."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, fields, replace
from heapq import nlargest
from typing import Literal

import torch

from services.gpu_worker.compiler.programs import CompiledMethod
from services.gpu_worker.finetune.backward import GradientState
from services.gpu_worker.finetune.host_ring import ring_depth
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.packing import Examples, filled
from services.gpu_worker.finetune.policies import LayerPolicies, fit, least_bytes_within
from services.gpu_worker.finetune.sequence_tensors import window_bytes
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.layouts import Layout
from services.gpu_worker.model.peft import Method
from services.gpu_worker.model.weights import ModelWeights


@dataclass(frozen=True, slots=True)
class JobMemory:
    """Bytes by owner."""

    trainable: int = 0  # the copy of the parameters that computes
    gradients: int = 0
    optimizer: int = 0  # masters and both moments
    activations: int = 0  # that wait for the backward, and on their way to host memory and back
    accumulators: int = 0  # gradients in flight: of the residual stream, of keys and of values
    windows: int = 0  # tokens, labels and masks
    host_activations: int = 0  # in host memory, as all below
    host_cache: int = 0  # keys and values of a parked job

    @property
    def parameters(self) -> int:
        return self.trainable + self.gradients + self.optimizer

    @property
    def device_bytes(self) -> int:
        return self.parameters + self.activations + self.accumulators + self.windows

    @property
    def host_bytes(self) -> int:
        return self.host_activations + self.host_cache

    def on_device(self) -> dict[str, int]:
        """By the owners' names."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("host_")}

    def on_host(self) -> dict[str, int]:
        return {"activations": self.host_activations, "kv_cache": self.host_cache}

    def __add__(self, other: JobMemory) -> JobMemory:
        return JobMemory(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __str__(self) -> str:
        return (
            f"{mib(self.device_bytes)} ({mib(self.parameters)} for parameters, their gradients and optimizer, "
            f"{mib(self.activations)} for activations, {mib(self.accumulators + self.windows)} for gradients in "
            f"flight and masks)"
        )


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


Moves = Literal["never", "at need", "always"]  # activations to host memory


@dataclass(frozen=True, slots=True)
class Room:
    """What a job may have: bytes of the device better no more than `aim`, never more than `most`.

    More than `aim` where this brings a token's backward through one layer down to `step_flops`.
    """

    aim: int
    most: int
    activations: int = 0  # of these better no more; 0: what `aim` leaves
    host: int = 0
    moves: Moves = "never"
    step_flops: float = math.inf


@dataclass(frozen=True, slots=True)
class JobPlan:
    """How a job runs within its room."""

    policies: LayerPolicies
    max_tokens: int  # of a training sequence
    num_host_layers: int  # whose activations lie in host memory, from the first layer on
    memory: JobMemory  # at most

    @property
    def can_park(self) -> bool:
        """Whether host memory has room for the keys and values of a training sequence."""
        return self.memory.host_cache > 0


class TooLarge(ValueError):
    """A job that does not fit, however lean."""


class JobPlanner:
    """Finds the policies of one job that compute least again within its room.

    Its part of the memory is exceeded where leaner policies' steps would be too long for the service level.
    Where not even the leanest fits, training sequences become shorter, down to the longest example; then the
    lowest layers' activations go to host memory.
    """

    def __init__(
        self,
        weights: ModelWeights,
        compiled: CompiledMethod,
        config: JobConfig,
        training: Examples,
        validation: Examples | None,
        num_lanes: int = 1,
        grain: int = 1,
    ) -> None:
        self._compiled, self._num_lanes, self._grain = compiled, num_lanes, grain
        self._model, self._dtype = weights.config, weights.dtype
        self._has_masks = not weights.kernels.is_triton
        self._parameters = parameter_bytes(weights, compiled.method, compiled.layout)
        held_out = validation.lengths if validation else []
        self._longest = max([*training.lengths, *held_out])
        per_step = config.batch_size * config.gradient_accumulation_steps
        self._most_trained = sum(nlargest(per_step, training.lengths))  # tokens of one sequence
        self._most_packed = max(self._most_trained, sum(held_out))
        self._lean = LayerPolicies.uniform(compiled, compiled.policies[-1])

    def plan(self, max_tokens: int, room: Room) -> JobPlan:
        """`max_tokens` bounds a training sequence. Raises TooLarge, with the bytes that are needed."""
        found = self._richest(max_tokens, room)
        if not _fits(found, room):
            found = self._leanest(max_tokens, room)
        if not _fits(found, room):
            raise TooLarge(
                f"the job needs at least {found.memory}; finetuning has {mib(room.most)} left for it"
            )
        return self._with_parking(found, room)

    def _with_parking(self, plan: JobPlan, room: Room) -> JobPlan:
        model, tokens = self._model, self._filled(self._most_packed, plan.max_tokens)
        cache = tokens * 2 * model.num_layers * model.kv_size * self._dtype.itemsize
        if plan.memory.host_bytes + cache > room.host:
            return plan
        return replace(plan, memory=replace(plan.memory, host_cache=cache))

    def _richest(self, max_tokens: int, room: Room) -> JobPlan:
        """Where not even the leanest activations fit, with these."""
        num_host_layers = self._model.num_layers if room.moves == "always" else 0
        aim, most = room.host, room.host
        if not num_host_layers:
            lean = self._plan(self._lean, max_tokens, 0).memory
            others = lean.device_bytes - lean.activations
            aim, most = room.aim - others, room.most - others
        tokens = self._filled(self._most_trained, max_tokens)
        in_time = math.ceil(tokens * least_bytes_within(self._compiled, room.step_flops))
        num_bytes = min(room.activations or max(aim, in_time), most)
        policies = fit(self._compiled, num_bytes / tokens)
        return self._plan(policies, max_tokens, num_host_layers)

    def _leanest(self, max_tokens: int, room: Room) -> JobPlan:
        """The longest sequences that fit on the device; where none does, the fewest layers in host memory."""
        lengths = range(min(self._longest, max_tokens), max_tokens + 1)
        num_fitting = bisect_right(
            lengths, room.most, key=lambda n: self._plan(self._lean, n, 0).memory.device_bytes
        )
        if num_fitting or room.moves == "never":
            return self._plan(self._lean, lengths[max(0, num_fitting - 1)], 0)
        depths = range(1, self._model.num_layers + 1)
        plans = [self._plan(self._lean, lengths[0], depth) for depth in depths]
        return next((plan for plan in plans if _fits(plan, room)), plans[-1])

    def _filled(self, num_tokens: int, max_tokens: int) -> int:
        return filled(min(num_tokens, max_tokens), max_tokens, self._grain)

    def _plan(self, policies: LayerPolicies, max_tokens: int, num_host_layers: int) -> JobPlan:
        tokens = self._filled(self._most_trained, max_tokens)
        kept = policies.reserve.layer_bytes(self._dtype)
        ring = policies.reserve.ring_bytes(self._dtype, num_host_layers, ring_depth(self._num_lanes))
        memory = replace(
            self._parameters,
            activations=tokens * (sum(kept[num_host_layers:]) + ring),
            host_activations=tokens * sum(kept[:num_host_layers]),
            accumulators=tokens * GradientState.bytes_per_token(self._model, self._dtype, self._num_lanes),
            windows=window_bytes(
                self._model,
                self._dtype,
                self._filled(self._most_packed, max_tokens),
                self._longest if self._has_masks else 0,
            ),
        )
        return JobPlan(policies, max_tokens, num_host_layers, memory)


def _fits(plan: JobPlan, room: Room) -> bool:
    return plan.memory.device_bytes <= room.most and plan.memory.host_bytes <= room.host


def parameter_bytes(weights: ModelWeights, method: Method, layout: Layout) -> JobMemory:
    """Of a rank's part of a method's parameters, without making them."""
    copy = AdapterWeights(weights, method, layout, torch.device("meta"))
    flat = sum(p.numel for p in copy.parameters) * accumulation_dtype(weights.dtype).itemsize
    return JobMemory(trainable=copy.size_bytes, gradients=flat, optimizer=3 * flat)
