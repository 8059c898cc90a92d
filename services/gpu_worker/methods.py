"""From the wire's words for a PEFT method to the method that the engine computes."""

from __future__ import annotations

from services.gpu_worker.model.peft import (
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
)
from shared.peft import BottleneckSpec, Ia3Spec, LoraSpec, PeftSpec, PrefixSpec, PromptSpec


def method_of(spec: PeftSpec) -> Method:
    """Raises InvalidAdapter. LoRA's dropout is a matter of the training, not of the method."""
    match spec:
        case LoraSpec():
            return LoraConfig(
                spec.rank, spec.alpha, spec.target_modules, rslora=spec.use_rslora, dora=spec.use_dora
            )
        case Ia3Spec():
            return Ia3Config(spec.target_modules, spec.feedforward_modules)
        case BottleneckSpec():
            return BottleneckConfig(
                spec.size, spec.target_modules, spec.activation, spec.scaling, spec.parallel
            )
        case PrefixSpec():
            return PrefixConfig(spec.num_virtual_tokens)
        case PromptSpec():
            return PromptConfig(spec.num_virtual_tokens)
