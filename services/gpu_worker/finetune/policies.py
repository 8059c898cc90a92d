"""Which activations each layer of a job keeps, by a byte budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from services.gpu_worker.compiler.emit import Program
from services.gpu_worker.compiler.programs import CompiledMethod
from services.gpu_worker.compiler.rematerialize import Policy
from services.gpu_worker.finetune.activations import Reserve

WORTH_KEEPING = (
    16.0  # FLOPs a byte: what is computed again for less takes no longer than to write and read it
)


@dataclass(frozen=True)
class LayerPolicies:
    """A method's policy at every layer."""

    compiled: CompiledMethod
    chosen: tuple[Policy, ...]

    @classmethod
    def uniform(cls, compiled: CompiledMethod, policy: Policy) -> LayerPolicies:
        return cls(compiled, (policy,) * compiled.config.num_layers)

    @cached_property
    def reserve(self) -> Reserve:
        if not self.compiled.trains_layers:
            return Reserve(self.compiled.tensors, (frozenset(),) * len(self.chosen))
        layers = [(policy, layer == 0) for layer, policy in enumerate(self.chosen)]
        kept = {layer: self.compiled.kept(*layer) for layer in set(layers)}
        return Reserve(self.compiled.tensors, tuple(kept[layer] for layer in layers))

    @property
    def flops_per_token(self) -> float:
        """Of what the backward computes again, in all layers."""
        return sum(policy.flops_per_token for policy in self.chosen)

    @property
    def step_flops(self) -> float:
        """Of a token in the last layer's backward, which no other layer's exceeds by much."""
        return self.compiled.backward_flops + self.chosen[-1].flops_per_token

    def program(self, layer: int) -> Program:
        return self.compiled.backward(self.chosen[layer], layer == 0)


def fit(compiled: CompiledMethod, bytes_per_token: float) -> LayerPolicies:
    """The policies that compute least again within a budget; where not even the leanest fits, the leanest.

    All layers have one policy or its richer neighbour: the price of a byte rises along the list, so one step
    down in every layer comes before two in any. The last layers keep more, for they give it back first.
    """
    num_layers, policies = compiled.config.num_layers, worthwhile(compiled.policies)
    fitting = (i for i, p in enumerate(policies) if num_layers * p.bytes_per_token <= bytes_per_token)
    index = next(fitting, len(policies) - 1)
    lean, rich = policies[index], policies[max(0, index - 1)]
    spare = bytes_per_token - num_layers * lean.bytes_per_token
    step = rich.bytes_per_token - lean.bytes_per_token
    richer = min(num_layers, int(spare // step)) if step > 0 and spare > 0 else 0
    return LayerPolicies(compiled, (lean,) * (num_layers - richer) + (rich,) * richer)


def least_bytes_within(compiled: CompiledMethod, step_flops: float) -> float:
    """Of a token in all layers, by the leanest policy whose backward takes no more FLOPs a token and layer; 0 where
    no policy's does, for then bytes do not help."""
    within = [p for p in compiled.policies if compiled.backward_flops + p.flops_per_token <= step_flops]
    return compiled.config.num_layers * within[-1].bytes_per_token if within else 0.0


def worthwhile(policies: list[Policy]) -> list[Policy]:
    """Without the first ones, which keep what is cheaper to compute again (norms, the gated activation)."""
    for index, (rich, lean) in enumerate(pairwise(policies)):
        price = (lean.flops_per_token - rich.flops_per_token) / (rich.bytes_per_token - lean.bytes_per_token)
        if price >= WORTH_KEEPING:
            return policies[index:]
    return policies[-1:]
