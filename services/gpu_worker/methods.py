"""From the wire's words for a PEFT method and a training to what the engine computes."""

from __future__ import annotations

from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import (
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
)
from shared.messages import TrainSpec
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


def job_config(spec: TrainSpec) -> JobConfig:
    return JobConfig(
        n_epochs=spec.n_epochs,
        batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        learning_rate=spec.learning_rate,
        lr_schedule=spec.lr_schedule,
        warmup_ratio=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        beta1=spec.beta1,
        beta2=spec.beta2,
        epsilon=spec.epsilon,
        max_grad_norm=spec.max_grad_norm,
        lora_dropout=spec.peft.dropout if isinstance(spec.peft, LoraSpec) else 0.0,
        seed=spec.seed,
        eval_every_steps=spec.eval_every_steps,
        max_steps=spec.max_steps,
    )
