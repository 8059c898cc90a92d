"""`x W^T + b` with a frozen weight.

On a CPU the weight is also kept in oneDNN's own layout. From a plain one it is laid out anew in every call,
which for the few rows of a decode takes half as long as the product itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(weight: Tensor) -> Tensor | None:
    """The weight [out, in] in oneDNN's layout, or None where that would not help."""
    ready = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not ready or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def frozen_linear(x: Tensor, weight: Tensor, packed: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """`packed` is `pack(weight)`."""
    if packed is None:
        return torch.nn.functional.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y
