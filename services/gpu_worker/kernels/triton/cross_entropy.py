"""Linear + softmax cross-entropy whose logits never leave the registers; twin in `kernels/cross_entropy.py`.

A first launch computes tiles of logits and keeps of each its log-sum-exp, maximum and label. For the gradient
a second one computes them again and writes what the loss's gradient with respect to them is, a piece of the
vocabulary at a time, in the model's dtype; that piece times the head is torch's product. A kernel that kept
the gradient in registers too would have to add to `dx` from many programs: slower, or not the same every time.
An adapter of the head is one more product of both launches; its gradients are summed piece by piece, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.bypass import BlockGradient
from services.gpu_worker.kernels.cross_entropy import MAX_LOGITS, CrossEntropy, LowRankHead
from services.gpu_worker.kernels.linear import FrozenLinear
from services.gpu_worker.kernels.triton.common import Configuration, dot
from services.gpu_worker.kernels.triton.configure import configure
from services.gpu_worker.kernels.triton.lora_gradient import accumulate_blocks, accumulate_product
from services.gpu_worker.kernels.triton.rows import check_floats, check_shape
from services.gpu_worker.kernels.triton.sizes import LOSS_ROWS, LOSS_TOKENS, UnsupportedShape, loss_piece

MOST_ROWS, TOKENS = LOSS_ROWS, LOSS_TOKENS
RANKS = 16  # of the head's adapter, that a program multiplies at a time


@triton.jit
def _logits(
    x_ptr, head_ptr, low_ptr, b_ptr, rows, tokens, num_rows, vocabulary, width, rank, x_stride, head_stride,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """[ROWS, TOKENS] in float32; zero outside of the rows and of the vocabulary. RANKS 0: the head has no adapter."""
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    head_rows = head_ptr + tokens.to(tl.int64)[None, :] * head_stride
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        x = tl.load(x_rows + columns[None, :], mask=inside, other=0.0)
        inside = (tokens < vocabulary)[None, :] & (columns < width)[:, None]
        total += dot(x, tl.load(head_rows + columns[:, None], mask=inside, other=0.0))
    if RANKS > 0:
        low_rows = low_ptr + rows.to(tl.int64)[:, None] * rank
        b_rows = b_ptr + tokens.to(tl.int64)[None, :] * rank
        for start in range(0, rank, RANKS):
            ranks = start + tl.arange(0, RANKS)
            inside = (rows < num_rows)[:, None] & (ranks < rank)[None, :]
            low = tl.load(low_rows + ranks[None, :], mask=inside, other=0.0)
            inside = (tokens < vocabulary)[None, :] & (ranks < rank)[:, None]
            total += dot(low, tl.load(b_rows + ranks[:, None], mask=inside, other=0.0))
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _measure_kernel(
    x_ptr,
    head_ptr,
    low_ptr,
    b_ptr,
    labels_ptr,
    lse_ptr,
    top_ptr,
    best_ptr,
    at_label_ptr,
    num_rows,
    vocabulary,
    width,
    rank,
    x_stride,
    head_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Of a tile: log-sum-exp, maximum and where it is, [tile of the vocabulary, row]; and the labels' logits."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    logits = _logits(
        x_ptr, head_ptr, low_ptr, b_ptr, rows, tokens, num_rows, vocabulary, width, rank, x_stride, head_stride,
        ROWS, TOKENS, COLUMNS, RANKS,
    )  # fmt: skip
    logits = tl.where((tokens < vocabulary)[None, :], logits, float("-inf"))
    top, best = tl.max(logits, 1, return_indices=True)
    lse = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), 1))
    here = rows < num_rows
    place = tl.program_id(1) * num_rows + rows
    tl.store(lse_ptr + place, lse, mask=here)
    tl.store(top_ptr + place, top, mask=here)
    tl.store(best_ptr + place, tl.program_id(1) * TOKENS + best, mask=here)
    label = tl.load(labels_ptr + rows, mask=here, other=-1)
    inside = (label >= tl.program_id(1) * TOKENS) & (label < tl.program_id(1) * TOKENS + TOKENS)
    own = tl.sum(tl.where(tokens[None, :] == label[:, None], logits, 0.0), 1)
    tl.store(at_label_ptr + rows, own, mask=inside & (label < vocabulary))


@triton.jit(do_not_specialize=["first_token", "num_rows"])
def _gradient_kernel(
    x_ptr,
    head_ptr,
    low_ptr,
    b_ptr,
    labels_ptr,
    lse_ptr,
    gradient_ptr,
    first_token,
    num_rows,
    vocabulary,
    width,
    rank,
    x_stride,
    head_stride,
    gradient_stride,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Probabilities of a piece of the vocabulary, less one at the label; zeros in rows without one."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    tokens = first_token + place
    logits = _logits(
        x_ptr, head_ptr, low_ptr, b_ptr, rows, tokens, num_rows, vocabulary, width, rank, x_stride, head_stride,
        ROWS, TOKENS, COLUMNS, RANKS,
    )  # fmt: skip
    label = tl.load(labels_ptr + rows, mask=rows < num_rows, other=-1)
    lse = tl.load(lse_ptr + rows, mask=rows < num_rows, other=0.0)
    gradient = tl.exp(logits - lse[:, None]) - (tokens[None, :] == label[:, None]).to(tl.float32)
    gradient = tl.where((label >= 0)[:, None], gradient, 0.0)
    out = gradient_ptr + rows.to(tl.int64)[:, None] * gradient_stride + place[None, :]
    inside = (rows < num_rows)[:, None] & ((tokens < vocabulary) & (place < gradient_stride))[None, :]
    tl.store(out, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


def linear_cross_entropy(
    x: Tensor,
    head: FrozenLinear,
    labels: Tensor,
    denominator: float,
    with_gradient: bool = True,
    low_rank: LowRankHead | None = None,
    max_logits: int = MAX_LOGITS,
) -> CrossEntropy:
    """`x` [N, D] (after the final norm), `head` [V, D], `labels` int64 [N]; a negative one is none.

    At most `max_logits` numbers of the logits' gradient exist at a time, or those of 128 tokens.
    """
    weight = _checked(x, head, labels, low_rank)
    x = x if x.stride(-1) == 1 else x.contiguous()
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if with_gradient else None
    for start in range(0, x.shape[0], MOST_ROWS):
        rows = slice(start, start + MOST_ROWS)
        low = None if low_rank is None else x[rows] @ low_rank.a.T
        chunk = _Rows(x[rows], weight, labels[rows], low_rank, low)
        lse, losses, hits = chunk.measure()
        loss += losses
        correct += hits
        if dx is not None:
            chunk.add_gradient(dx[rows], lse, denominator, max_logits)
    return CrossEntropy(loss, correct, dx)


def _checked(x: Tensor, head: FrozenLinear, labels: Tensor, low_rank: LowRankHead | None) -> Tensor:
    """The head's weight [V, D]; a quantised one is made dense for the call."""
    check_floats("x", x)
    weight = head.dense()
    if x.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype or head.bias is not None:
        shown = f"{x.dtype} {list(x.shape)} and a head of {weight.dtype} {list(weight.shape)}"
        raise UnsupportedShape(f"no kernel for x {shown}" + (" with a bias" if head.bias is not None else ""))
    check_shape("labels", labels, (x.shape[0],))
    if low_rank is not None:
        a, b = low_rank.a, low_rank.b
        shapes = (len(a), x.shape[1]), (len(weight), len(a))
        if (
            (tuple(a.shape), tuple(b.shape)) != shapes
            or {a.dtype, b.dtype} != {x.dtype}
            or not b.is_contiguous()
        ):
            shown = f"A {a.dtype} {list(a.shape)} and B {b.dtype} {list(b.shape)}"
            raise UnsupportedShape(
                f"{shown} are no low-rank part of a head of {x.dtype} {list(weight.shape)}"
            )
    return weight.contiguous()


def _tile(dtype: torch.dtype, num_rows: int) -> dict[str, int]:
    """float32 is multiplied without tensor cores, from twice the memory."""
    narrow = dtype != torch.float32
    rows = min(128 if narrow else 64, max(16, triton.next_power_of_2(num_rows)))
    warps, stages = (8, 3) if narrow and rows == 128 else (4, 3 if narrow else 2)
    columns = 64 if narrow else 32
    return {"ROWS": rows, "TOKENS": TOKENS, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}


@dataclass(frozen=True, slots=True)
class _Rows:
    """Those of one launch."""

    x: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor
    low_rank: LowRankHead | None
    low: Tensor | None  # [N, R]

    @property
    def _operands(self) -> tuple[Tensor, ...]:
        if self.low_rank is None or self.low is None:
            return self.x, self.weight, self.x, self.weight, self.labels  # the adapter's are not looked at
        return self.x, self.weight, self.low, self.low_rank.b, self.labels

    @property
    def _sizes(self) -> tuple[int, ...]:
        x, weight, rank = self.x, self.weight, 0 if self.low is None else self.low.shape[1]
        return *(len(x), len(weight), x.shape[1], rank), x.stride(0), weight.stride(0)

    @property
    def _options(self) -> dict[str, Any]:
        return _tile(self.x.dtype, len(self.x)) | {"RANKS": 0 if self.low is None else RANKS}

    def measure(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum-exp of each row, the sum of the losses, and the number of hits."""
        num_rows, tiles = len(self.x), triton.cdiv(len(self.weight), TOKENS)
        options, device = self._options, self.x.device
        parts, tops = (torch.empty(tiles, num_rows, dtype=torch.float32, device=device) for _ in range(2))
        places = torch.empty(tiles, num_rows, dtype=torch.int32, device=device)
        at_label = torch.zeros(num_rows, dtype=torch.float32, device=device)
        _measure_kernel[triton.cdiv(num_rows, options["ROWS"]), tiles](
            *self._operands, parts, tops, places, at_label, *self._sizes, **options
        )
        lse = parts.logsumexp(0)
        best = places.gather(0, tops.argmax(0, keepdim=True))[0]
        losses = torch.where(self.labels >= 0, lse - at_label, 0).sum()
        return lse, losses, (best == self.labels).sum()

    def add_gradient(self, dx: Tensor, lse: Tensor, denominator: float, max_logits: int) -> None:
        """`dx` += the gradient of the losses over `denominator`, piece by piece of the vocabulary."""
        (num_rows, vocabulary, *_), options = self._sizes, self._options
        piece = loss_piece(vocabulary, num_rows, max_logits)
        memory = torch.empty(num_rows * piece, dtype=self.x.dtype, device=self.x.device)
        d_low = None if self.low is None else torch.zeros_like(self.low, dtype=torch.float32)
        for first in range(0, vocabulary, piece):
            tokens = slice(first, min(first + piece, vocabulary))
            size = tokens.stop - first
            gradient = memory[: num_rows * size].view(num_rows, size)
            _gradient_kernel[triton.cdiv(num_rows, options["ROWS"]), triton.cdiv(size, TOKENS)](
                *self._operands, lse, gradient, first, *self._sizes, size, **options
            )
            dx.addmm_(gradient, self.weight[tokens], alpha=1 / denominator)
            if d_low is not None:
                self._accumulate_b(d_low, gradient, tokens, denominator)
        if d_low is not None and self.low_rank is not None:
            assert self.low_rank.grad_a is not None
            narrow = d_low.to(self.x.dtype)
            accumulate_product(self.low_rank.grad_a, narrow, self.x)
            dx.addmm_(narrow, self.low_rank.a)

    def _accumulate_b(self, d_low: Tensor, gradient: Tensor, tokens: slice, denominator: float) -> None:
        """Adds a piece's part to the gradients of B and of the intermediates."""
        head, low = self.low_rank, self.low
        assert head is not None and low is not None and head.grad_b is not None
        d_low.add_(gradient @ head.b[tokens], alpha=1 / denominator)
        whole = slice(0, gradient.shape[1]), slice(0, low.shape[1])
        block = BlockGradient(*whole, head.scale / denominator, head.grad_b[tokens])
        accumulate_blocks((block,), gradient, low)


def _configurations(dtype: torch.dtype, num_rows: int, ranks: int) -> list[Configuration]:
    tile = _tile(dtype, num_rows) | {"RANKS": ranks}
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    kernels = {"cross_entropy_measure": _measure_kernel, "cross_entropy_gradient": _gradient_kernel}
    types = dict.fromkeys(("lse_ptr", "top_ptr", "at_label_ptr"), torch.float32)
    types |= {"labels_ptr": torch.int64, "best_ptr": torch.int32}
    shape = f"{tile['ROWS']}" + ("-low_rank" if ranks else "")
    return [
        configure(f"{name}-{shape}", kernel, tile, dtype, warps, stages, types)
        for name, kernel in kernels.items()
    ]


CONFIGURATIONS = [
    each
    for dtype in (torch.bfloat16, torch.float32)
    for num_rows in (16, 64, 128)
    if not (dtype == torch.float32 and num_rows == 128)  # it has no such tile
    for ranks in (0, RANKS)
    for each in _configurations(dtype, num_rows, ranks)
]
