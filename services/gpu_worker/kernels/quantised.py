"""Frozen linears in int8 (a scale per row) or int4 (a scale and a zero per group of inputs), as QLoRA keeps them.

Only the weight is quantised, by rounding to the nearest level; what comes in and what goes out keep the model's
dtype. Few rows in bfloat16 on a CPU take torch's own kernels, which read the codes. Everything else (many rows,
the gradient, other dtypes, a GPU) dequantises a piece of the weight, at most PIECE elements of it, and
multiplies by that, so that no layer needs more memory than that beside twice its result. The pieces run along what
is not summed over: cutting changes no sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from math import gcd
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from services.gpu_worker.kernels.linear import FrozenLinear

Scheme = Literal["int8", "int4"]
SCHEMES: tuple[Scheme, ...] = ("int8", "int4")

# GGUF's Q4_1 takes 32 as well: of a model that was dequantised from it, such as the default one, int4 loses next
# to nothing again. Groups of 64 save a tenth of the bytes.
GROUP_SIZE = 32

# Elements dequantised at once, in the model's dtype, beside at most one byte an element to unpack int4.
# A single block of rows or group of columns may be larger.
PIECE = 1 << 22

# Up to so many rows the kernels that read the codes win; a dequantised weight then pays for itself in the
# faster product. Measured in bfloat16 with AVX512-BF16 on 576 x 576 to 3072 x 576. In float32 and float16 the
# same kernels take 6 to 100 times as long as the dense product, so those dtypes never use them.
INT8_KERNEL_ROWS = 32
INT4_KERNEL_ROWS = 64
INT4_KERNEL_GROUPS = (32, 64, 128, 256)


class QuantisedLinear(FrozenLinear, ABC):
    """What both schemes share: products by pieces of the dequantised weight."""

    kernel_rows: int  # inputs of up to so many rows go to `_kernel`; 0 where it does not run
    row_unit: int  # what `rows` and `columns` are cut at
    column_unit: int

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """`dense()[start:stop]`; cheapest where both are multiples of `row_unit`."""

    @abstractmethod
    def columns(self, start: int, stop: int) -> Tensor:
        """`dense()[:, start:stop]`; both are multiples of `column_unit`."""

    @abstractmethod
    def _kernel(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out] without the bias."""

    def dense(self) -> Tensor:
        return self.rows(0, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if 0 < len(x) <= self.kernel_rows:
            y = self._kernel(x.contiguous())
            return y if self.bias is None else y.add_(self.bias)
        return self.forward_rows(x, self.out_features)

    def forward_rows(self, x: Tensor, rows: int) -> Tensor:
        return _joined(
            linear(x, self.rows(start, stop), None if self.bias is None else self.bias[start:stop])
            for start, stop in _pieces(rows, self.in_features, self.row_unit)
        )

    def input_gradient(self, dy: Tensor) -> Tensor:
        pieces = _pieces(self.in_features, self.out_features, self.column_unit)
        return _joined(dy @ self.columns(start, stop) for start, stop in pieces)


class Int8Linear(QuantisedLinear):
    """Codes int8 [out, in], scales [out] in the model's dtype: w = code * scale."""

    row_unit = column_unit = 1

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._codes, self._scales = codes, scales
        # With other widths the kernel reads beyond its rows: torch checks nothing here.
        self.kernel_rows = INT8_KERNEL_ROWS if _has_kernels(scales) and self.in_features % 32 == 0 else 0

    @classmethod
    def quantise(cls, weight: Tensor, bias: Tensor | None = None) -> Int8Linear:
        parts = [_symmetric(weight[start:stop]) for start, stop in _pieces(*weight.shape)]
        codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(codes, scales, bias)

    @property
    def out_features(self) -> int:
        return self._codes.shape[0]

    @property
    def in_features(self) -> int:
        return self._codes.shape[1]

    @property
    def size_bytes(self) -> int:
        return _bytes(self._codes, self._scales, self.bias)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._codes[start:stop].to(self._scales.dtype).mul_(self._scales[start:stop, None])

    def columns(self, start: int, stop: int) -> Tensor:
        return self._codes[:, start:stop].to(self._scales.dtype).mul_(self._scales[:, None])

    def _kernel(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, self._codes, self._scales)
        return y


class Int4Linear(QuantisedLinear):
    """Codes 0 to 15, two a byte; scales and zeros [in / group, out, 2]: w = (code - 8) * scale + zero.

    Rows lie in blocks [out / block, in, block / 2]: a byte holds a row of the block's first half below one of
    its second. With the processor's own block that is what torch's kernel reads, so one copy serves both uses.
    """

    def __init__(self, packed: Tensor, scales_zeros: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._packed, self._scales_zeros = packed, scales_zeros
        self.row_unit, self.column_unit = 2 * packed.shape[2], packed.shape[1] // len(scales_zeros)
        fits = self.row_unit == _kernel_block() and self.column_unit in INT4_KERNEL_GROUPS
        self.kernel_rows = INT4_KERNEL_ROWS if fits and _has_kernels(scales_zeros) else 0

    @classmethod
    def quantise(cls, weight: Tensor, bias: Tensor | None = None, group_size: int = GROUP_SIZE) -> Int4Linear:
        out, width = weight.shape
        if group_size < 1 or width % group_size:
            raise ValueError(f"int4: {width} input features are no multiple of the group size {group_size}")
        if out % 2:
            raise ValueError(f"int4 packs rows in pairs and cannot hold {out} output features")
        parts = [_affine(weight[start:stop], group_size) for start, stop in _pieces(*weight.shape)]
        codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
        scales_zeros = torch.stack((scales.T, zeros.T), -1).contiguous()
        return cls(_pack_codes(codes, gcd(out, _kernel_block() or 64)), scales_zeros, bias)

    @property
    def out_features(self) -> int:
        return self._packed.shape[0] * self.row_unit

    @property
    def in_features(self) -> int:
        return self._packed.shape[1]

    @property
    def size_bytes(self) -> int:
        return _bytes(self._packed, self._scales_zeros, self.bias)

    def rows(self, start: int, stop: int) -> Tensor:
        first, last = start // self.row_unit, -(-stop // self.row_unit)
        blocks = self._dequantise(slice(first, last), slice(0, self.in_features))
        return blocks[start - first * self.row_unit : stop - first * self.row_unit]

    def columns(self, start: int, stop: int) -> Tensor:
        return self._dequantise(slice(0, len(self._packed)), slice(start, stop))

    def _dequantise(self, blocks: slice, columns: slice) -> Tensor:
        """The weight's rows of `blocks` and its `columns`, the transpose of a contiguous tensor."""
        packed = self._packed[blocks, columns].bitwise_xor(0x88)  # codes less 8, as signed nibbles
        num_blocks, width, half = packed.shape
        dense = torch.empty(width, num_blocks, 2 * half, dtype=self._scales_zeros.dtype, device=packed.device)
        dense[..., half:] = (packed.view(torch.int8) >> 4).transpose(0, 1)
        dense[..., :half] = (
            packed.bitwise_left_shift_(4).view(torch.int8).bitwise_right_shift_(4).transpose(0, 1)
        )
        groups = slice(columns.start // self.column_unit, columns.stop // self.column_unit)
        rows = slice(blocks.start * self.row_unit, blocks.stop * self.row_unit)
        # Contiguous, for a broadcast over strided ones takes four times as long.
        scales, zeros = self._scales_zeros[groups, rows].permute(2, 0, 1).contiguous()[:, :, None]
        grouped = dense.view(len(scales), self.column_unit, -1)
        return torch.addcmul(zeros, grouped, scales, out=grouped).view(width, -1).T

    def _kernel(self, x: Tensor) -> Tensor:
        packed = self._packed.view(self.out_features, -1)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, packed, self.column_unit, self._scales_zeros
        )
        return y


def quantise(
    weight: Tensor, bias: Tensor | None = None, *, scheme: Scheme, group_size: int = GROUP_SIZE
) -> QuantisedLinear:
    """The weight [out, in] rounded; in int4, `group_size` inputs of a row share a scale and a zero.

    Every element is off by at most half a scale, and a rounding to the model's dtype.
    Raises ValueError for a weight that is not finite or that the scheme cannot hold.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("a weight that is not finite cannot be quantised")
    if scheme == "int8":
        return Int8Linear.quantise(weight, bias)
    if scheme == "int4":
        return Int4Linear.quantise(weight, bias, group_size)
    raise ValueError(f"quantisation {scheme!r} is not one of {', '.join(SCHEMES)}")


def _symmetric(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 of rows [out, in] and their scales [out]."""
    wide = weight.to(_wide(weight.dtype))
    scales = _usable(wide.abs().amax(1) / 127, weight.dtype)
    codes = (wide / scales[:, None].to(wide.dtype)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def _affine(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 of rows [out, in], their scales and zeros [out, in / group].

    16 levels from a group's least to its greatest weight. The scale is taken after the zero was rounded, and
    makes up for it.
    """
    dtype = weight.dtype
    groups = weight.to(_wide(dtype)).view(len(weight), -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    zeros = (low + (high - low) * (8 / 15)).to(dtype)
    wide = zeros.to(groups.dtype)
    scales = _usable(torch.maximum((wide - low) / 8, (high - wide) / 7), dtype)
    codes = ((groups - wide) / scales.to(groups.dtype)).round_().add_(8).clamp_(0, 15)
    return codes.to(torch.uint8).view_as(weight), scales[..., 0], zeros[..., 0]


def _usable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in `dtype`, never so small that they lose their digits; a group of zeros keeps the smallest."""
    return scales.to(dtype).clamp_min_(torch.finfo(dtype).tiny)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pack_codes(codes: Tensor, block: int) -> Tensor:
    """uint8 [out, in] -> [out / block, in, block / 2]."""
    halves = codes.view(len(codes) // block, 2, block // 2, -1)
    return (halves[:, 1] << 4).bitwise_or_(halves[:, 0]).transpose(1, 2).contiguous()


def _pieces(length: int, other: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Cuts `length` rows or columns of `other` elements into ranges of whole units."""
    step = max(1, PIECE // (other * unit)) * unit
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _joined(parts: Iterator[Tensor]) -> Tensor:
    """Side by side; most weights are one piece, whose product needs no copy."""
    found = list(parts)
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


@lru_cache
def _kernel_block() -> int | None:
    """How many rows torch's int4 kernel keeps together on this processor; None if in an unknown way."""
    for block in (64, 32):
        codes = torch.arange(2 * block * 32, dtype=torch.int32).view(2 * block, 32).remainder_(13)
        theirs: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        if torch.equal(theirs.flatten(), _pack_codes(codes.to(torch.uint8), block).flatten()):
            return block
    return None


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
