"""A LoRA job's trainable parameters: one flat float32 master, its gradient, AdamW, and the copy that computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.kernels.lora import BlockGradient
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model.adapters import GROUPS, LoraConfig, LoraWeights, Projection
from services.gpu_worker.model.config import ModelConfig

STATE = {"masters", "step", "exp_avg", "exp_avg_sq"}  # before the first step the masters alone
Take = Callable[[int, int], tuple[Tensor, Tensor]]  # rows, columns -> views of master and gradient


@dataclass(frozen=True, slots=True)
class GroupGradient:
    """Accumulators of one fused linear: the stacked A and each projection's B."""

    a: Tensor
    b: tuple[BlockGradient, ...]


class LoraParameters:
    """Masters and gradients are views of two flat tensors, so that clipping, AdamW and checkpoints see one.

    The flat order is: for each layer and fused linear, the stacked A, then each projection's B.
    """

    def __init__(
        self,
        model: ModelConfig,
        lora: LoraConfig,
        job: JobConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.weights = LoraWeights(model, lora, dtype, device)
        self._job = job
        wide = accumulation_dtype(dtype)
        size = sum(
            lora.rank * (projection.in_features + projection.out_features)
            for projection, _ in self.weights.blocks.values()
        )
        self.flat = torch.zeros(size * model.num_layers, dtype=wide, device=device)
        self.grad = torch.zeros_like(self.flat)
        self._masters: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self.gradients: list[dict[str, GroupGradient]] = []
        self._slice(model.num_layers)
        self._reset_masters(job.seed)
        self._optimizer = torch.optim.AdamW(
            [self.flat],
            lr=job.learning_rate,
            betas=(job.beta1, job.beta2),
            eps=job.epsilon,
            weight_decay=job.weight_decay,
        )
        self.refresh()

    def _slice(self, num_layers: int) -> None:
        offset = 0

        def take(rows: int, columns: int) -> tuple[Tensor, Tensor]:
            nonlocal offset
            span = slice(offset, offset + rows * columns)
            offset = span.stop
            return self.flat[span].view(rows, columns), self.grad[span].view(rows, columns)

        for layer in range(num_layers):
            self.gradients.append({})
            for group in GROUPS:
                members = [(n, *block) for n, block in self.weights.blocks.items() if block[0].group == group]
                if members:
                    self.gradients[layer][group] = self._slice_group(layer, members, take)

    def _slice_group(
        self, layer: int, members: list[tuple[str, Projection, slice]], take: Take
    ) -> GroupGradient:
        a, grad_a = take(members[-1][2].stop, members[0][1].in_features)
        blocks = []
        for name, projection, columns in members:
            b, grad_b = take(projection.out_features, self.weights.config.rank)
            self._masters[layer, name] = (a[columns], b)
            blocks.append(BlockGradient(projection.rows, columns, self.weights.config.scaling, grad_b))
        return GroupGradient(grad_a, tuple(blocks))

    def _reset_masters(self, seed: int) -> None:
        """PEFT's default start: A uniform in ±1/sqrt(in), B zero; drawn on the CPU, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        for a, b in self._masters.values():
            bound = 1 / math.sqrt(a.shape[1])
            a.copy_(torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
            b.zero_()

    def masters(self) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
        """(layer, target) -> A [r, in], B [out, r] without the scaling; views, write through them and `refresh`."""
        return self._masters

    def refresh(self) -> None:
        """Rounds the masters into the weights that forward and backward compute with."""
        for (layer, name), (a, b) in self._masters.items():
            self.weights.set(layer, name, a, b)

    def step(self, learning_rate: float) -> float | None:
        """Clips, moves and clears the gradient. Returns its norm before clipping, or None when it was not
        finite: then nothing moves."""
        norm = float(torch.linalg.vector_norm(self.grad))
        if not math.isfinite(norm):
            self.grad.zero_()
            return None
        if self._job.max_grad_norm and norm > self._job.max_grad_norm:
            self.grad.mul_(self._job.max_grad_norm / (norm + 1e-6))
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self.flat.grad = self.grad
        self._optimizer.step()
        self.grad.zero_()
        self.refresh()
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed job needs, on the CPU, detached from what goes on moving."""
        moments = self._optimizer.state.get(self.flat, {})
        tensors = {"masters": self.flat, **{name: moments[name] for name in moments}}
        return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; raises ValueError where a tensor is missing or a size differs."""
        if state.keys() not in ({"masters"}, STATE):
            raise ValueError(
                f"the checkpoint holds {', '.join(sorted(state))}, not {', '.join(sorted(STATE))}"
            )
        for name, value in state.items():
            if name != "step" and value.shape != self.flat.shape:
                raise ValueError(
                    f"checkpoint tensor {name!r} has {value.numel()} values, not {self.flat.numel()}"
                )
        self.flat.copy_(state["masters"])
        moments = {name: value.clone() for name, value in state.items() if name != "masters"}
        if moments:
            self._optimizer.state[self.flat] = {
                name: value if name == "step" else value.to(self.flat.device)
                for name, value in moments.items()
            }
        self.grad.zero_()
        self.refresh()
