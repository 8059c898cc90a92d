"""Whole-sequence autograd of transformers + peft on the same weights: what token-level finetuning must equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama as llama
import transformers.models.mistral.modeling_mistral as mistral
import transformers.models.qwen2.modeling_qwen2 as qwen2
import transformers.models.qwen3.modeling_qwen3 as qwen3
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.gpu_worker.baseline import add_bottlenecks, peft_config
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.trainer import Trainer
from services.gpu_worker.model.adapters import Key
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.parameters import parameters
from services.gpu_worker.model.peft import BottleneckConfig, Method

NORMS = (llama.LlamaRMSNorm, mistral.MistralRMSNorm, qwen2.Qwen2RMSNorm, qwen3.Qwen3RMSNorm)


@contextmanager
def exact_norms() -> Iterator[None]:
    """transformers rounds to float32 inside its norms; a float64 comparison needs them to keep float64."""
    before = [norm.forward for norm in NORMS]

    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * rstd).to(x.dtype)

    for norm in NORMS:
        norm.forward = forward
    try:
        yield
    finally:
        for norm, original in zip(NORMS, before, strict=True):
            norm.forward = original


def make_peft(folder: Path, dtype: torch.dtype, method: Method) -> Any:
    """The folder's model with the method on it, every trainable value random (LoRA's B = 0 would hide a wrong
    gradient of A), and nothing rounded to float32 inside."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    torch.manual_seed(1)
    if isinstance(method, BottleneckConfig):
        model = add_bottlenecks(model, method, torch.float32)
    else:
        model = get_peft_model(model, peft_config(method))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                around = 1.0 if "ia3_l" in name else parameter if "magnitude" in name else 0.0
                parameter.copy_(around + torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def trainable_tensors(model: Any, method: Method, config: ModelConfig) -> dict[Key, Tensor]:
    """The oracle's parameters under our keys, in our shapes; `.grad` of each is its gradient."""
    named = {_file_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[Key, Tensor] = {}
    for parameter in parameters(config, method):
        found[parameter.layer, parameter.key] = named.pop(parameter.file_name)
    assert not named, f"not ours: {', '.join(named)}"
    return found


def _file_name(name: str) -> str:
    """What PEFT calls a parameter in a file."""
    if name.startswith("prompt_encoder."):
        return "prompt_embeddings"
    if name.startswith("model."):  # a bottleneck, which PEFT does not know
        return f"base_model.model.{name}"
    return name.replace("_vector.default.weight", "_vector").replace(".default", "")


def copy_from(trainer: Trainer, model: Any) -> None:
    """Makes the job's masters the oracle's values."""
    with torch.no_grad():
        for key, value in trainable_tensors(model, trainer.method, trainer._model.config).items():
            value.copy_(trainer.parameters.masters[key].view(value.shape))


def copy_to(trainer: Trainer, model: Any) -> None:
    """Makes the oracle's values the job's masters."""
    values = trainable_tensors(model, trainer.method, trainer._model.config)
    for key, master in trainer.parameters.masters.items():
        master.copy_(values[key].detach().view(master.shape))
    trainer.parameters.refresh()


def batch_loss(model: Any, dataset: Dataset, examples: list[int]) -> Tensor:
    """Mean cross-entropy over the labelled tokens of all examples."""
    total, count = torch.zeros((), dtype=model.dtype), 0
    for index in examples:
        tokens, labels = dataset.example(index)
        logits = model(input_ids=torch.from_numpy(tokens).long()[None]).logits[0]
        logits = logits[-len(tokens) :]  # not the rows of virtual tokens
        target = torch.from_numpy(labels)
        total = total + torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        count += int((target != -100).sum())
    return total / count
