"""The customary training loop: transformers and autograd, LoRA on every linear, AdamW on the adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import add_lora, copy_adapters, transformers_model
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.parameters import Key
from services.gpu_worker.model.weights import ModelWeights


class AutogradLoop:
    """Over the weights that the engine has, too; `name` says whose LoRA it is."""

    def __init__(
        self,
        hf_config: dict[str, Any],
        weights: ModelWeights,
        job: JobConfig,
        *,
        checkpointing: bool = False,
        start: dict[Key, Tensor] | None = None,
    ) -> None:
        model = transformers_model(hf_config, weights)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model, self.name = add_lora(model)
        if start is not None:
            copy_adapters(self.model, start)
        self.job, self._device = job, weights.device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        decay, betas = job.weight_decay, (job.beta1, job.beta2)
        self._optimizer = torch.optim.AdamW(
            self.parameters, lr=job.learning_rate, betas=betas, weight_decay=decay
        )

    def forward(self, tokens: Any) -> Tensor:
        """Loss of `tokens` [B, T], each of which is learnt; what the backward reads lives as long as it."""
        own = torch.as_tensor(tokens, dtype=torch.int64, device=self._device)
        loss: Tensor = self.model(input_ids=own, labels=own, use_cache=False).loss
        return loss

    def step(self, tokens: Any) -> float:
        """The loss before the step."""
        loss = self.forward(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.job.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())
