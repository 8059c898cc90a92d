"""`x W^T + b` with a frozen weight, and its gradient with respect to `x`; the weight has none."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import linear


class FrozenLinear(ABC):
    """However the weight is kept: dense here, quantised in `kernels/quantised.py`."""

    bias: Tensor | None

    @property
    @abstractmethod
    def out_features(self) -> int: ...

    @property
    @abstractmethod
    def in_features(self) -> int: ...

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """All that is resident."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight [out, in] in the model's dtype, as a product reads it."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""

    @abstractmethod
    def forward_rows(self, x: Tensor, rows: int) -> Tensor:
        """The first `rows` features of `forward`: [N, in] -> [N, rows]."""

    @abstractmethod
    def input_gradient(self, dy: Tensor) -> Tensor:
        """[N, out] -> [N, in]."""


class DenseLinear(FrozenLinear):
    """`weight` [out, in] in the model's dtype.

    On a CPU products are oneDNN's: those of float32, which torch leaves to MKL, took longer there on an AMD processor.
    A bfloat16 weight is also kept in oneDNN's own layout. From a plain one it is laid out anew in every
    call, which for the few rows of a decode takes half as long as the product itself.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._packed = packed(weight) if gains_by_packing(weight.device, weight.dtype) else None
        self._is_onednn = weight.device.type == "cpu" and weight.dtype == torch.float32

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def size_bytes(self) -> int:
        tensors = [t for t in (self.weight, self.bias) if t is not None]
        packed = 0 if self._packed is None else self.weight.numel() * self.weight.element_size()
        return sum(t.numel() * t.element_size() for t in tensors) + packed

    def dense(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return onednn_product(x, self._packed, self.bias)
        return self._multiply(x, self.weight, self.bias)

    def forward_rows(self, x: Tensor, rows: int) -> Tensor:
        return self._multiply(x, self.weight[:rows], None if self.bias is None else self.bias[:rows])

    def input_gradient(self, dy: Tensor) -> Tensor:
        return self._multiply(dy, self.weight.T, None)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_product(x, weight, bias) if self._is_onednn else linear(x, weight, bias)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` by oneDNN, of a weight in any layout."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def gains_by_packing(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `onednn_product` is faster with a weight in oneDNN's own layout."""
    ready = device.type == "cpu" and dtype == torch.bfloat16
    return ready and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weight: Tensor) -> Tensor:
    """The weight in that layout, for `onednn_product` alone."""
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return reordered
