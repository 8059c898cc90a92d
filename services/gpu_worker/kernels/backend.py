"""Which kernels compute: torch's operations, or Triton's kernels of the same names. Chosen once for each engine.

The choice is a value that the model's weights carry, so two engines of a process may differ. Nothing is probed and
nothing falls back: what a chosen kernel cannot do is an error that says so. triton is imported where it is chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from services.gpu_worker.kernels import (
    adamw,
    bypass,
    cross_entropy,
    kv_cache,
    lora_stream,
    norm_rope,
    paged_attention,
    paged_attention_backward,
    sampling,
)

KernelChoice = Literal["auto", "triton", "torch"]
RmsNorm = Callable[[Tensor, Tensor, float], Tensor]
RmsNormBackward = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]
RopeCacheWrite = Callable[..., Tensor]
Result = TypeVar("Result")


class KernelFailure(RuntimeError):
    """A chosen kernel has no form for what it was given, or does not compile."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations that exist in both forms. Contracts are those of torch's."""

    name: Literal["torch", "triton"]
    rms_norm: RmsNorm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rms_norm_backward: RmsNormBackward
    rope: Rotation
    rope_backward: Rotation
    rope_cache_write: RopeCacheWrite
    silu_mul: Callable[[Tensor, Tensor], Tensor]
    silu_mul_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    linear_cross_entropy: Callable[..., cross_entropy.CrossEntropy]
    adamw_: Callable[..., None]
    paged_attention: Callable[[Tensor, Tensor, Tensor, paged_attention.PagedBatch], tuple[Tensor, Tensor]]
    paged_attention_backward: Callable[..., Tensor]
    add_low_rank_: Callable[[Tensor, Tensor, lora_stream.LoraStream, int, int], Tensor]
    accumulate_low_rank: Callable[..., None]
    low_rank_backward_: Callable[..., Tensor]
    sample_tokens: Callable[[Tensor, sampling.SamplingRows], Tensor]

    @property
    def is_triton(self) -> bool:
        return self.name == "triton"


TORCH = Kernels(
    "torch",
    norm_rope.rms_norm,
    norm_rope.add_rms_norm,
    norm_rope.rms_norm_backward,
    norm_rope.rope,
    norm_rope.rope_backward,
    kv_cache.rope_cache_write,
    norm_rope.silu_mul,
    norm_rope.silu_mul_backward,
    cross_entropy.linear_cross_entropy,
    adamw.adamw_,
    paged_attention.paged_attention,
    paged_attention_backward.paged_attention_backward,
    lora_stream.add_low_rank_,
    bypass.accumulate_low_rank,
    bypass.low_rank_backward_,
    sampling.sample_tokens,
)


def choose_kernels(choice: KernelChoice, device: torch.device) -> Kernels:
    """auto: Triton's on a GPU, torch's elsewhere. Raises ValueError where the choice cannot compute on the device."""
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels {choice!r} are none of auto, triton, torch")
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return TORCH
    try:
        import triton
    except ImportError as error:
        raise ValueError(
            f"kernels {choice!r} on {device} need triton, which is not installed: FLEXLLM_KERNELS=torch is the way "
            "round"
        ) from error
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"kernels 'triton' do not run on {device}, only in Triton's interpreter (TRITON_INTERPRET=1, for tests): "
            "FLEXLLM_KERNELS=torch or auto is the way round"
        )
    return _triton_kernels()


@functools.cache
def _triton_kernels() -> Kernels:
    from services.gpu_worker.kernels.triton import activation, attention, attention_backward, lora_gradient
    from services.gpu_worker.kernels.triton import adamw as fused_adamw
    from services.gpu_worker.kernels.triton import cross_entropy as fused_cross_entropy
    from services.gpu_worker.kernels.triton import kv_cache as fused_cache
    from services.gpu_worker.kernels.triton import lora_stream as fused_lora
    from services.gpu_worker.kernels.triton import norm_rope as fused
    from services.gpu_worker.kernels.triton import sampling as fused_sampling

    return Kernels(
        "triton",
        _explained(fused.rms_norm),
        _explained(fused.add_rms_norm),
        _explained(fused.rms_norm_backward),
        _explained(fused.rope),
        _explained(fused.rope_backward),
        _explained(fused_cache.rope_cache_write),
        _explained(activation.silu_mul),
        _explained(activation.silu_mul_backward),
        _explained(fused_cross_entropy.linear_cross_entropy),
        _explained(fused_adamw.adamw_),
        _explained(attention.paged_attention),
        _explained(attention_backward.paged_attention_backward),
        _explained(fused_lora.add_low_rank_),
        _explained(lora_gradient.accumulate_low_rank),
        _explained(lora_gradient.low_rank_backward_),
        _explained(fused_sampling.sample_tokens),
    )


def _explained(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """The kernel, whose failures say what it was given and what to do."""
    from triton.errors import TritonError

    from services.gpu_worker.kernels.triton.sizes import UnsupportedShape

    @functools.wraps(kernel)
    def call(*args: Any, **options: Any) -> Result:
        try:
            return kernel(*args, **options)
        except (UnsupportedShape, TritonError) as error:
            given = ", ".join(_shown(argument) for argument in (*args, *options.values()))
            raise KernelFailure(
                f"Triton's {kernel.__name__}({given}) failed: {error}; FLEXLLM_KERNELS=torch is the way round"
            ) from error

    return call


def _shown(argument: object) -> str:
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')} {list(argument.shape)}"
    return str(argument) if isinstance(argument, int | float | None) else type(argument).__name__
