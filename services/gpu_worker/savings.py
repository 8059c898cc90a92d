"""What FlexLLM's compilation saves of a training sequence's memory, step by step, beside transformers + peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from services.gpu_worker.baseline import (
    AdapterDtype,
    AutogradBytes,
    autograd_bytes,
    checkpointing_bytes,
    logits_bytes,
)
from services.gpu_worker.dry_run import Form, sequence_bytes
from services.gpu_worker.dry_window import window_bytes
from services.gpu_worker.finetune.policies import LayerPolicies, worthwhile
from services.gpu_worker.model.peft import BottleneckConfig, Method


@dataclass(frozen=True, slots=True)
class Flops:
    """Of a token of the whole model that has a label."""

    forward_flops_per_token: float  # of the layers
    backward_flops_per_token: float
    head_flops_per_token: float  # forward and backward

    @property
    def total(self) -> float:
        return self.forward_flops_per_token + self.backward_flops_per_token + self.head_flops_per_token

    def percent(self, extra: float) -> float:
        return 100 * extra / self.total


@dataclass(frozen=True, slots=True)
class Step:
    """Memory of one training sequence, parameters and optimizer left out."""

    name: str
    kept_bytes: int  # from the forward to the backward, keys and values included
    work_bytes: int  # the most that comes on top of it
    extra_flops_percent: float

    @property
    def peak_bytes(self) -> int:
        return self.kept_bytes + self.work_bytes


def framework(method: Method) -> str:
    """peft has no bottleneck adapters, so modules like ours stand in for them."""
    own = isinstance(method, BottleneckConfig)
    return "transformers + own modules" if own else "transformers + peft"


def baselines(
    hf_config: dict[str, Any], method: Method, flops: Flops, num_tokens: int, dtype: torch.dtype
) -> list[Step]:
    """The plain ones, the leaner of them first, and gradient checkpointing; what comes on top are the logits with
    their copies and gradients, or one layer. Raises BaselineUnavailable."""
    own, name = str(dtype).removeprefix("torch."), framework(method)
    logits = logits_bytes(hf_config, num_tokens, dtype).peak
    num_layers = hf_config["num_hidden_layers"]

    def measure(adapter_dtype: AdapterDtype) -> AutogradBytes:
        return autograd_bytes(
            hf_config, method, num_tokens=num_tokens, adapter_dtype=adapter_dtype, dtype=dtype
        )

    usual = measure("model")
    found = [Step(f"{name}, adapters in {own}", num_layers * usual.per_layer, logits, 0.0)]
    if dtype != torch.float32:
        usual = measure("float32")
        default = "" if isinstance(method, BottleneckConfig) else " (peft's default)"
        full = f"{name}, adapters in float32{default}"
        found.append(Step(full, num_layers * usual.per_layer, logits, 0.0))
    checkpointed = checkpointing_bytes(hf_config, method, usual, dtype)
    if checkpointed is not None:
        kept, work = checkpointed - usual.per_layer, max(usual.per_layer, logits)
        extra = flops.percent(flops.forward_flops_per_token)
        found.append(Step(f"{name}, gradient checkpointing", kept, work, extra))
    return found


def recomputed_flops(policies: LayerPolicies) -> float:
    """Of a token, in all layers."""
    return policies.flops_per_token if policies.compiled.trains_layers else 0.0


@dataclass(frozen=True, slots=True)
class Ablation:
    """The compiler's passes and token-level windows, each on top of those before it."""

    policies: LayerPolicies
    flops: Flops
    hf_config: dict[str, Any]
    form: Form  # of the backbone's linears
    num_tokens: int
    window: int
    dropout: float
    cache_bytes: int  # of the sequence

    def steps(self) -> list[Step]:
        """Without windows the whole sequence is computed at once, and its loss as transformers computes it."""
        compiled = self.policies.compiled
        elementwise = worthwhile(compiled.policies)[0]
        uniform = LayerPolicies.uniform
        return [
            self._step("+ graph pruning", uniform(compiled, compiled.policies[0])),
            self._step("+ rematerialisation, elementwise", uniform(compiled, elementwise)),
            self._step("+ rematerialisation, products", self.policies),
            self._step(f"+ token-level windows of {self.window}", self.policies, in_windows=True),
            self._step("the same, leanest policy", uniform(compiled, compiled.policies[-1]), in_windows=True),
        ]

    def _step(self, name: str, policies: LayerPolicies, in_windows: bool = False) -> Step:
        compiled = self.policies.compiled
        window = self.window if in_windows else self.num_tokens
        sizes = compiled.dtype, self.num_tokens, window, compiled.kernels
        held = sequence_bytes(compiled.config, *sizes).total
        loss = None if in_windows else logits_bytes(self.hf_config, self.num_tokens, compiled.dtype).peak
        peak = window_bytes(policies, self.form, self.num_tokens, window, self.dropout, loss).peak
        kept = policies.reserve.bytes_per_token(compiled.dtype) * self.num_tokens + self.cache_bytes
        return Step(name, kept, held + peak, self.flops.percent(recomputed_flops(policies)))
