"""Gradients of what a method trains outside the layers: prompts, the embedding's and the head's low-rank parts."""

from __future__ import annotations

from torch import Tensor

from services.gpu_worker.finetune.backward import BackwardContext
from services.gpu_worker.finetune.optimizer import TrainableParameters
from services.gpu_worker.kernels.cross_entropy import LowRankHead
from services.gpu_worker.model.peft import EMBEDDING, HEAD, LoraConfig, Method


def low_rank_head(parameters: TrainableParameters, method: Method) -> LowRankHead | None:
    """What the loss reads of the head's low-rank part, and where it adds the gradients."""
    pair = parameters.weights.low_rank(HEAD)
    if pair is None or not isinstance(method, LoraConfig):
        return None
    gradients = parameters.gradients
    return LowRankHead(*pair, method.scaling, gradients[None, f"{HEAD}.a"], gradients[None, f"{HEAD}.b"])


def accumulate_below(
    parameters: TrainableParameters, method: Method, tokens: Tensor, context: BackwardContext
) -> None:
    """Adds a window's gradients of what the first layer's input was made from; `tokens` [n] are the window's, and
    `context` that of the first layer's backward, which has been done."""
    dx = context.state.dx[context.tokens]
    if (None, "prompt.rows") in parameters.gradients:
        context.accumulate_virtual(parameters.gradients[None, "prompt.rows"], dx)
    pair = parameters.weights.low_rank(EMBEDDING)
    if pair is not None and isinstance(method, LoraConfig):
        a, b = pair
        wide = parameters.grad.dtype
        grad_a, grad_b = (parameters.gradients[None, f"{EMBEDDING}.{role}"] for role in "ab")
        grad_a.index_add_(1, tokens, (dx @ b).T.to(wide))
        grad_b.add_((dx.T @ a[:, tokens].T).to(wide), alpha=method.scaling)
