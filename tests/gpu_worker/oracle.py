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
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.gpu_worker.finetune.dataset import Dataset

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


def make_peft(folder: Path, dtype: torch.dtype, rank: int, alpha: float, targets: tuple[str, ...]) -> Any:
    """The folder's model with a LoRA whose A and B are random (B = 0 would hide a wrong gradient of A)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return peft.to(dtype)


def lora_tensors(peft: Any, gradients: bool = False) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """(layer, target) -> A and B, or their gradients."""
    found: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for name, module in peft.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            parts = name.split(".")
            pair = module.lora_A["default"].weight, module.lora_B["default"].weight
            key = int(parts[parts.index("layers") + 1]), parts[-1]
            found[key] = (pair[0].grad, pair[1].grad) if gradients else (pair[0].data, pair[1].data)
    return found


def batch_loss(peft: Any, dataset: Dataset, examples: list[int]) -> Tensor:
    """Mean cross-entropy over the labelled tokens of all examples."""
    total, count = torch.zeros((), dtype=peft.dtype), 0
    for index in examples:
        tokens, labels = dataset.example(index)
        logits = peft(input_ids=torch.from_numpy(tokens).long()[None]).logits[0]
        target = torch.from_numpy(labels)
        total = total + torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        count += int((target != -100).sum())
    return total / count
