"""The loss of a linear head: the kernels and their torch twin against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from services.gpu_worker.baseline import LiveBytes
from services.gpu_worker.kernels import cross_entropy as torch_twin
from services.gpu_worker.kernels.cross_entropy import MAX_LOGITS, LowRankHead
from services.gpu_worker.kernels.linear import DenseLinear
from services.gpu_worker.kernels.quantised import quantise
from services.gpu_worker.kernels.triton import cross_entropy as kernels
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape
from tests.kernels.triton.twins import DTYPES, Numbers, assert_close

DENOMINATOR = 7.0
ROUNDINGS = 3  # of intermediates too
both = pytest.mark.parametrize("ops", [torch_twin, kernels], ids=["torch", "triton"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize(
    ("num_rows", "vocabulary", "width"),
    [(1, 128, 64), (17, 129, 96), (64, 1000, 40), (130, 300, 24), (5, 49152 // 64, 576), (3, 1, 8)],
)


def make_case(
    num_rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, DenseLinear, Tensor]:
    """With a label among each row's likely tokens now and then, so that there are hits."""
    draw = Numbers(dtype, device)
    x, weight = draw.apart(num_rows, width), draw(vocabulary, width, scale=2 * width**-0.5)
    labels = torch.randint(vocabulary, (num_rows,), generator=torch.Generator().manual_seed(0)).to(device)
    labels[::3] = (x.double() @ weight.double().T).argmax(-1)[::3]
    return x, DenseLinear(weight), labels


def exact(x: Tensor, head: DenseLinear, labels: Tensor) -> tuple[Tensor, int, Tensor]:
    """Loss, hits and gradient of the rows with a label."""
    leaf = x.double().requires_grad_()
    logits = leaf @ head.weight.double().T
    loss = cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    (gradient,) = torch.autograd.grad(loss / DENOMINATOR, leaf)
    return loss.detach(), int((logits.argmax(-1) == labels).sum()), gradient


@both
@dtypes
@shapes
def test_loss_hits_and_gradient(
    ops: Any, dtype: torch.dtype, num_rows: int, vocabulary: int, width: int, device: torch.device
) -> None:
    x, head, labels = make_case(num_rows, vocabulary, width, dtype, device)
    loss, hits, gradient = exact(x, head, labels)
    found = ops.linear_cross_entropy(x, head, labels, DENOMINATOR)
    if vocabulary > 1:
        assert_close(found.loss_sum, loss, dtype)
    else:
        assert found.loss_sum.abs() < 1e-6
    is_rounded = (
        ops is torch_twin and dtype != torch.float32
    )  # logits are: a likely token may tie with the label
    assert abs(int(found.num_correct) - hits) <= is_rounded
    if vocabulary > 1:
        assert_close(found.dx, gradient, dtype)
    alone = ops.linear_cross_entropy(x, head, labels, DENOMINATOR, with_gradient=False)
    assert alone.dx is None
    assert torch.equal(alone.loss_sum, found.loss_sum)


# --- a head with an adapter

SCALE = 2.0


def make_low_rank(head: DenseLinear, rank: int, draw: Numbers) -> LowRankHead:
    """Whose accumulators hold something already."""
    vocabulary, width = head.weight.shape
    a, b = draw(rank, width, scale=width**-0.5), draw(vocabulary, rank, scale=rank**-0.5)
    return LowRankHead(
        a, b, SCALE, torch.ones_like(a, dtype=torch.float32), torch.ones_like(b, dtype=torch.float32)
    )


def exact_low_rank(
    x: Tensor, head: DenseLinear, labels: Tensor, low_rank: LowRankHead
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, and the gradients of x, of A, and of B before it is scaled, added to ones."""
    leaves = [t.double().requires_grad_() for t in (x, low_rank.a, low_rank.b)]
    logits = leaves[0] @ head.weight.double().T + leaves[0] @ leaves[1].T @ leaves[2].T
    loss = cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    dx, da, db = torch.autograd.grad(loss / DENOMINATOR, leaves)
    return loss.detach(), dx, 1 + da, 1 + SCALE * db


@both
@dtypes
@pytest.mark.parametrize(
    ("num_rows", "vocabulary", "width", "rank"),
    [(17, 129, 96, 8), (5, 300, 40, 1), (70, 140, 24, 40)],
)
def test_an_adapter_of_the_head_has_its_part_and_its_gradients(
    ops: Any,
    dtype: torch.dtype,
    num_rows: int,
    vocabulary: int,
    width: int,
    rank: int,
    device: torch.device,
) -> None:
    x, head, labels = make_case(num_rows, vocabulary, width, dtype, device)
    low_rank = make_low_rank(head, rank, Numbers(dtype, device, seed=1))
    loss, dx, grad_a, grad_b = exact_low_rank(x, head, labels, low_rank)
    found = ops.linear_cross_entropy(
        x, head, labels, DENOMINATOR, low_rank=low_rank, max_logits=128 * num_rows
    )
    assert_close(found.loss_sum, loss, dtype)
    assert_close(found.dx, dx, dtype, ROUNDINGS)
    assert_close(low_rank.grad_a, grad_a, dtype, ROUNDINGS)
    assert_close(low_rank.grad_b, grad_b, dtype, ROUNDINGS)
    judged = LowRankHead(low_rank.a, low_rank.b, SCALE)
    alone = ops.linear_cross_entropy(x, head, labels, 1.0, with_gradient=False, low_rank=judged)
    assert alone.dx is None
    assert_close(alone.loss_sum, loss, dtype)


def test_rows_without_a_label_move_no_adapter(device: torch.device) -> None:
    x, head, labels = make_case(9, 140, 16, torch.float32, device)
    labels[[0, 4]] = -100
    low_rank = make_low_rank(head, 4, Numbers(torch.float32, device, seed=1))
    _, dx, grad_a, grad_b = exact_low_rank(x, head, labels, low_rank)
    found = kernels.linear_cross_entropy(x, head, labels, DENOMINATOR, low_rank=low_rank)
    for own, expected in ((found.dx, dx), (low_rank.grad_a, grad_a), (low_rank.grad_b, grad_b)):
        assert own is not None
        assert_close(own, expected, torch.float32, ROUNDINGS)


@dtypes
def test_rows_without_a_label_count_nowhere(dtype: torch.dtype, device: torch.device) -> None:
    x, head, labels = make_case(37, 300, 48, dtype, device)
    labels[[0, 3, 16, 36]] = -100
    loss, hits, gradient = exact(x, head, labels)
    found = kernels.linear_cross_entropy(x, head, labels, DENOMINATOR)
    assert_close(found.loss_sum, loss, dtype)
    assert int(found.num_correct) == hits
    assert found.dx is not None
    assert_close(found.dx, gradient, dtype)
    assert not found.dx[labels < 0].any()


def test_nothing_to_learn_is_a_loss_of_zero(device: torch.device) -> None:
    x, head, labels = make_case(5, 130, 16, torch.float32, device)
    for rows in (0, 5):
        found = kernels.linear_cross_entropy(x[:rows], head, torch.full_like(labels[:rows], -100), 1.0)
        assert (float(found.loss_sum), int(found.num_correct)) == (0, 0)
        assert found.dx is not None and found.dx.shape == (rows, 16) and not found.dx.any()


@pytest.mark.parametrize("piece", [1, 128, 256, 1000])
def test_a_vocabulary_in_pieces_gives_the_gradient_of_one_piece(piece: int, device: torch.device) -> None:
    x, head, labels = make_case(20, 1000, 32, torch.float32, device)
    whole = kernels.linear_cross_entropy(x, head, labels, DENOMINATOR)
    cut = kernels.linear_cross_entropy(x, head, labels, DENOMINATOR, max_logits=piece * 20)
    torch.testing.assert_close(cut.dx, whole.dx, rtol=1e-5, atol=1e-6)


def test_more_rows_than_a_launch_measures_are_measured_in_turns(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, head, labels = make_case(50, 140, 16, torch.float32, device)
    whole = kernels.linear_cross_entropy(x, head, labels, DENOMINATOR)
    monkeypatch.setattr(kernels, "MOST_ROWS", 32)
    cut = kernels.linear_cross_entropy(x, head, labels, DENOMINATOR)
    torch.testing.assert_close(cut.loss_sum, whole.loss_sum)
    torch.testing.assert_close(cut.dx, whole.dx)
    assert int(cut.num_correct) == int(whole.num_correct)


def test_large_logits_overflow_nowhere(device: torch.device) -> None:
    x = torch.tensor([[200.0, 0.0], [-200.0, 1.0]], device=device)
    head = DenseLinear(torch.eye(2, device=device))
    found = kernels.linear_cross_entropy(x, head, torch.tensor([1, 0], device=device), 1.0)
    assert float(found.loss_sum) == pytest.approx(200 + 201)
    assert found.dx is not None
    assert found.dx.tolist() == [[1.0, -1.0], [-1.0, 1.0]]


@pytest.mark.parametrize("pieces", [1, 5])
def test_logits_are_never_there(pieces: int, device: torch.device) -> None:
    """Only their gradient, a piece of the vocabulary at a time, and what a launch keeps of each tile."""
    if device.type != "cpu":
        pytest.skip("what torch allocates is the same on every device")
    num_rows, vocabulary = 40, 128 * 25
    x, head, labels = make_case(num_rows, vocabulary, 16, torch.float16, device)
    for max_logits, with_gradient in ((num_rows * vocabulary // pieces, True), (MAX_LOGITS, False)):
        with LiveBytes() as live:
            kernels.linear_cross_entropy(x, head, labels, 1.0, with_gradient, max_logits=max_logits)
        # the interpreter makes tensors of its own of the inputs' memory
        given = sum(tensor.untyped_storage().nbytes() for tensor in (x, head.weight, labels))
        kept = 4 * 4 * num_rows * (vocabulary // 128)
        assert live.peak < given + kept + (2 * max_logits if with_gradient else 0) + 8192


def test_a_quantised_head_is_used_dense(device: torch.device) -> None:
    x, head, labels = make_case(9, 160, 64, torch.float32, device)
    quantised = quantise(head.weight, scheme="int8")
    found = kernels.linear_cross_entropy(x, quantised, labels, DENOMINATOR)
    expected = kernels.linear_cross_entropy(x, DenseLinear(quantised.dense()), labels, DENOMINATOR)
    assert torch.equal(found.dx, expected.dx)


def test_what_kernels_cannot_do_is_refused_with_its_shape(device: torch.device) -> None:
    x, head, labels = make_case(3, 20, 8, torch.float32, device)
    low_rank = LowRankHead(torch.ones(2, 8, device=device), torch.ones(19, 2, device=device), 1.0)
    with pytest.raises(
        UnsupportedShape, match=r"B torch.float32 \[19, 2\] are no low-rank part of a head of"
    ):
        kernels.linear_cross_entropy(x, head, labels, 1.0, low_rank=low_rank)
    with pytest.raises(
        UnsupportedShape, match=r"x torch.float32 \[3, 7\] and a head of torch.float32 \[20, 8\]"
    ):
        kernels.linear_cross_entropy(x[:, :7], head, labels, 1.0)
    with pytest.raises(UnsupportedShape, match=r"labels is \[2\] and not \[3\]"):
        kernels.linear_cross_entropy(x, head, labels[:2], 1.0)
    biased = DenseLinear(head.weight, torch.zeros(20, device=device))
    with pytest.raises(UnsupportedShape, match="with a bias"):
        kernels.linear_cross_entropy(x, biased, labels, 1.0)
