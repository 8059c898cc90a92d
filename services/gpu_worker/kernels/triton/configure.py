"""Configurations from the way in which kernels name their arguments, so that a list of them stays short."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from services.gpu_worker.kernels.triton.common import Configuration, pointer


def configure(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    num_warps: int = 4,
    num_stages: int = 2,
    types: Mapping[str, str | torch.dtype] | None = None,
) -> Configuration:
    """Arguments `*_ptr` point to `dtype`, all others are i32 (strides and widths multiples of 16), unless `types`
    says what they point to or are."""
    signature: dict[str, str] = {}
    for argument in inspect.signature(kernel.fn).parameters:
        given = (types or {}).get(argument, dtype if argument.endswith("_ptr") else "i32")
        if argument not in constants:
            signature[argument] = pointer(given) if isinstance(given, torch.dtype) else given
    aligned = frozenset(argument for argument in signature if argument.endswith(("stride", "width")))
    shown = str(dtype).removeprefix("torch.")
    return Configuration(f"{name}-{shown}", kernel, signature, constants, num_warps, num_stages, aligned)
