"""A job's trainable parameters: one flat float32 master, its gradient, AdamW, and the copy that computes.

Of ranks that share the model each has its part of them, and the same bits of what all of them have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.steps import PART, make_stepper
from services.gpu_worker.kernels.adamw import clip_factor
from services.gpu_worker.kernels.bypass import BlockGradient, ScaledGradient
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.kernels.transfer import Readback
from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.layouts import ONE_RANK, Layout
from services.gpu_worker.model.parameters import Key, Parameter, initial
from services.gpu_worker.model.peft import (
    GROUPS,
    BottleneckConfig,
    LoraConfig,
    Method,
    PrefixConfig,
    projections,
)
from services.gpu_worker.model.weights import ModelWeights

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = {"masters", "step", *MOMENTS}  # before the first step the masters alone


@dataclass(frozen=True, slots=True)
class GradientNorm:
    """Of a gradient before it is clipped, on its way to the host."""

    _norm: Readback

    def read(self) -> float | None:
        """None where it is not finite."""
        norm = float(self._norm.read())
        return norm if math.isfinite(norm) else None


class TrainableParameters:
    """Masters and gradients are views of two flat tensors, so that clipping, AdamW and checkpoints see one.

    `accumulators[layer]` is what a backward program sums gradients into, under the names that it uses.
    """

    def __init__(self, base: ModelWeights, method: Method, job: JobConfig, layout: Layout = ONE_RANK) -> None:
        """`layout` is for as many ranks as share the base."""
        self.weights = AdapterWeights(base, method, layout)
        self._base, self._method, self._job = base, method, job
        self._shards = self.weights.shards
        size = sum(parameter.numel for parameter in self.weights.parameters)
        self.flat = torch.zeros(size, dtype=accumulation_dtype(base.dtype), device=base.device)
        self.grad = torch.zeros_like(self.flat)
        self._starts: dict[Key, int] = {}
        self.masters: dict[Key, Tensor] = {}  # views: write through them and `refresh`
        self.gradients: dict[Key, Tensor] = {}
        self._slice()
        self._reset_masters()
        self._stepper = make_stepper(self.flat, self.grad, job, base.kernels)
        self.refresh()

    @property
    def size_bytes(self) -> int:
        """Masters, gradients, AdamW's two moments, and the copy that computes."""
        return 4 * self.flat.nbytes + self.weights.size_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Masters and moments; the first step makes the moments."""
        return self.flat.nbytes + self._stepper.size_bytes

    def _slice(self) -> None:
        start = 0
        for parameter in self.weights.parameters:
            key, span = (parameter.layer, parameter.key), slice(start, start + parameter.numel)
            self._starts[key], start = start, span.stop
            self.masters[key] = self.flat[span].view(parameter.shape)
            self.gradients[key] = self.grad[span].view(parameter.shape)

    def _reset_masters(self) -> None:
        """Drawn whole and on the CPU: the same on every device and for any number of ranks."""
        generator = torch.Generator().manual_seed(self._job.seed)
        for whole in self._shards.whole:
            master = self.masters[whole.place]
            if whole.role == "magnitude":
                assert whole.layer is not None
                projection = projections(self._base.config)[whole.module]
                master.copy_(self.weights.row_lengths(whole.layer, projection))
            else:
                master.copy_(self._shards.part(whole, initial(whole, generator, self._base.embedding)))

    def refresh(self) -> None:
        """Rounds the masters into the weights that forward and backward compute with."""
        self.weights.load(self.masters)
        self.accumulators = [self._accumulators(layer) for layer in range(self._base.config.num_layers)]

    # --- accumulators

    def _accumulators(self, layer: int) -> dict[str, Any]:
        if isinstance(self._method, LoraConfig):
            return self._low_rank(layer, self._method)
        if isinstance(self._method, PrefixConfig):
            width = self._base.config.kv_size
            own = self.gradients[None, "prefix.rows"][:, 2 * layer * width : 2 * (layer + 1) * width]
            return {"prefix": (own[:, :width], own[:, width:])}
        found: dict[str, Any] = {}
        for parameter in self.weights.parameters:
            if parameter.layer == layer:
                found[parameter.key] = self._accumulator(parameter)
        return found

    def _accumulator(self, parameter: Parameter) -> Tensor | ScaledGradient:
        grad = self.gradients[parameter.layer, parameter.key]
        if not isinstance(self._method, BottleneckConfig):
            return grad
        return ScaledGradient(grad, self._method.scaling if parameter.role.startswith("up") else 1.0)

    def _low_rank(self, layer: int, lora: LoraConfig) -> dict[str, Any]:
        """A fused linear's A's as one, each B for itself, and DoRA's magnitudes."""
        found: dict[str, Any] = {}
        for group in GROUPS:
            members = [
                p
                for p in projections(self._base.config).values()
                if p.group == group and p.name in lora.targets
            ]
            if not members:
                continue
            first = layer, f"{members[0].name}.a"
            start, width = self._starts[first], self._shards.shape(first)[1]
            shape = len(members) * lora.rank, width
            found[f"{group}.a"] = self.grad[start : start + math.prod(shape)].view(shape)
            found[f"{group}.b"] = tuple(
                BlockGradient(
                    self.weights.rows[p.name],
                    self.weights.columns[p.name],
                    lora.scaling,
                    self.gradients[layer, f"{p.name}.b"],
                )
                for p in members
            )
            for p in members if lora.dora else ():
                key = layer, f"{p.name}.magnitude"
                found[key[1]] = ScaledGradient(self.gradients[key], self.weights.inverse_norms[key])
        return found

    # --- steps

    @property
    def num_parts(self) -> int:
        """Into which an update can be cut."""
        return max(1, math.ceil(self.flat.numel() / PART))

    def step(self, learning_rate: float) -> GradientNorm:
        """A whole update; returns as `begin_step`."""
        norm = self.begin_step(learning_rate)
        self.move(0, self.num_parts)
        self.end_step()
        return norm

    def begin_step(self, learning_rate: float) -> GradientNorm:
        """Clips the gradient; one that is not finite moves nothing. Returns its norm before that."""
        norm = self._reduce_gradient()
        self._stepper.begin(learning_rate, clip_factor(norm, self._job.max_grad_norm))
        return GradientNorm(Readback(norm))

    def move(self, start: int, end: int) -> None:
        """AdamW on some of the parts; each has to have its turn once between `begin_step` and `end_step`."""
        self._stepper.move(start, end)

    def end_step(self) -> None:
        """Clears the gradient and lets forward and backward compute with what has moved."""
        self.grad.zero_()
        self.refresh()

    def _reduce_gradient(self) -> Tensor:
        """Makes the rank's gradient complete; returns the norm of all ranks', a scalar on the device.

        What every rank has is summed, or taken from the first where each has computed all of it, so that it
        stays the same on all of them to the last bit.
        """
        group = self._base.group
        if group.size == 1:
            norm: Tensor = torch.linalg.vector_norm(self.grad)
            return norm
        places = [p.place for p in self.weights.parameters]
        shared = [place for place in places if self._shards.dim(place) is None]
        for place in shared if group.rank else ():
            if not self._shards.is_partial(place):
                self.gradients[place].zero_()
        divided = [self.gradients[place] for place in places if self._shards.dim(place) is not None]
        squares = sum((grad.double().square().sum() for grad in divided), self.grad.new_zeros(1).double())
        flat = torch.cat([self.gradients[place].flatten() for place in shared] + [self.grad.new_zeros(0)])
        group.all_reduce_(squares)
        group.all_reduce_(flat)
        sizes = [self.gradients[place].numel() for place in shared]
        for place, total in zip(shared, flat.split(sizes), strict=True):
            self.gradients[place].copy_(total.view_as(self.gradients[place]))
        return (squares + flat.double().square().sum()).sqrt().squeeze()

    def whole_masters(self) -> dict[Key, Tensor]:
        """Of all ranks, shaped as files have them; every rank has to call it."""
        return self._shards.by_place(self._shards.gather(self.flat))

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed job needs, whatever number of ranks resumes it: on the CPU, detached from what
        goes on moving. Every rank has to call it."""
        moments = self._stepper.moments()
        found = {"masters": self._shards.gather(self.flat)}
        if moments is not None:
            found["step"] = torch.tensor(float(self._stepper.num_steps))
            found |= {n: self._shards.gather(m) for n, m in zip(MOMENTS, moments, strict=True)}
        return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; raises ValueError where a tensor is missing or a size differs."""
        if state.keys() not in ({"masters"}, STATE):
            raise ValueError(
                f"the checkpoint holds {', '.join(sorted(state))}, not {', '.join(sorted(STATE))}"
            )
        size = sum(parameter.numel for parameter in self._shards.whole)
        for name, value in state.items():
            if name != "step" and value.shape != (size,):
                raise ValueError(f"checkpoint tensor {name!r} has {value.numel()} values, not {size}")
        self.flat.copy_(self._shards.cut(state["masters"]))
        if "step" in state:
            moments = (self._shards.cut(state[name]).to(self.flat.device, copy=True) for name in MOMENTS)
            self._stepper.load(int(state["step"]), *moments)
        self.grad.zero_()
        self.refresh()
