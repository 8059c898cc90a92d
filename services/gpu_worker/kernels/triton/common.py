"""What all kernels share: products that the interpreter computes right, and how a kernel is compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from services.gpu_worker.kernels.triton.sizes import TYPES

# the decorator has looked at the same knob, so a kernel knows which way it runs
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b):
    """`a @ b` in float32. Float32 operands keep their 24 bits: the default is TF32 with 11."""
    if INTERPRETED:  # it multiplies bfloat16 as the integers that it keeps them in
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision="ieee")


def pointer(dtype: torch.dtype) -> str:
    """The type of a tensor argument in a `Configuration`'s signature."""
    return f"*{TYPES[dtype]}"


@dataclass(frozen=True, slots=True)
class Configuration:
    """A kernel as some shape calls it, for compiling it where no GPU is.

    `signature` maps each run-time argument to its type ("i32", "fp32", or from `pointer`), `constants` each
    constexpr to its value. `aligned` names the integers that a launch finds to be divisible by 16, as most
    strides are; tensors always count as aligned.
    """

    name: str
    kernel: Callable[..., Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: frozenset[str] = field(default_factory=frozenset)
