"""The loss in chunks and slabs of rows: the same numbers, and never more logits alive than allowed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from services.gpu_worker.baseline import LiveBytes
from services.gpu_worker.kernels import cross_entropy
from services.gpu_worker.kernels.cross_entropy import (
    MAX_LOGITS,
    SLAB,
    CrossEntropy,
    LowRankHead,
    linear_cross_entropy,
)
from services.gpu_worker.kernels.linear import DenseLinear

VOCABULARY, WIDTH, ROWS, RANK = 1000, 8, 150, 3


@dataclass(slots=True)
class Case:
    x: Tensor
    weight: Tensor
    labels: Tensor
    a: Tensor
    b: Tensor

    def low_rank(self) -> LowRankHead:
        return LowRankHead(self.a, self.b, 0.5, torch.zeros_like(self.a), torch.zeros_like(self.b))

    def run(self, max_logits: int, low_rank: LowRankHead | None = None) -> CrossEntropy:
        head = DenseLinear(self.weight)
        return linear_cross_entropy(self.x, head, self.labels, 7.0, low_rank=low_rank, max_logits=max_logits)


def make_case(dtype: torch.dtype = torch.float64, num_rows: int = ROWS, vocabulary: int = VOCABULARY) -> Case:
    torch.manual_seed(0)
    return Case(
        x=torch.randn(num_rows, WIDTH, dtype=dtype),
        weight=torch.randn(vocabulary, WIDTH, dtype=dtype),
        labels=torch.randint(vocabulary, (num_rows,)),
        a=torch.randn(RANK, WIDTH, dtype=dtype),
        b=torch.randn(vocabulary, RANK, dtype=dtype),
    )


@pytest.mark.parametrize(("chunk", "slab"), [(1, 1), (7, 3), (7, 100), (64, 1), (149, 11), (150, 150)])
@pytest.mark.parametrize("with_low_rank", [False, True])
def test_chunks_and_slabs_give_the_loss_and_gradients_of_one(
    chunk: int, slab: int, with_low_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case()
    whole_head, cut_head = (case.low_rank() if with_low_rank else None for _ in range(2))
    monkeypatch.setattr(cross_entropy, "MOST_ROWS", ROWS)
    whole = case.run(MAX_LOGITS, whole_head)
    monkeypatch.setattr(cross_entropy, "SLAB", slab * VOCABULARY)
    cut = case.run(chunk * VOCABULARY, cut_head)
    torch.testing.assert_close(cut.loss_sum, whole.loss_sum, rtol=1e-13, atol=0)
    assert int(cut.num_correct) == int(whole.num_correct)
    torch.testing.assert_close(cut.dx, whole.dx, rtol=1e-12, atol=1e-13)
    if whole_head is not None and cut_head is not None:
        torch.testing.assert_close(cut_head.grad_a, whole_head.grad_a, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(cut_head.grad_b, whole_head.grad_b, rtol=1e-12, atol=1e-13)


def test_chunks_give_what_autograd_gives() -> None:
    case, head = make_case(), make_case().low_rank()
    found = case.run(37 * VOCABULARY, head)
    x, a, b = (tensor.clone().requires_grad_() for tensor in (case.x, case.a, case.b))
    logits = x @ case.weight.T + x @ a.T @ b.T
    loss = torch.nn.functional.cross_entropy(logits, case.labels, reduction="sum")
    (loss / 7.0).backward()
    torch.testing.assert_close(found.loss_sum, loss.detach(), rtol=1e-13, atol=0)
    assert int(found.num_correct) == int((logits.argmax(-1) == case.labels).sum())
    torch.testing.assert_close(found.dx, x.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(head.grad_a, a.grad, rtol=1e-12, atol=1e-13)
    assert b.grad is not None
    torch.testing.assert_close(head.grad_b, 0.5 * b.grad, rtol=1e-12, atol=1e-13)  # B's own scale is in b


@pytest.mark.parametrize("num_rows", [1, 20, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_more_logits_are_alive_than_allowed(dtype: torch.dtype, num_rows: int) -> None:
    """In the model's dtype, and a slab in float32. float16 stands in for bfloat16, which oneDNN packs."""
    vocabulary = 20_000
    case = make_case(dtype, num_rows=150, vocabulary=vocabulary)
    head = DenseLinear(case.weight)
    with LiveBytes() as live:
        linear_cross_entropy(case.x, head, case.labels, 1.0, max_logits=num_rows * vocabulary)
    logits, slab = num_rows * vocabulary * dtype.itemsize, min(num_rows * vocabulary, SLAB) * 4
    assert logits < live.peak <= logits + slab + 64 * 1024  # what else there is, is narrow
