"""The gradient of paged attention against that of its definition in float64, window by window."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.gpu_worker.kernels import paged_attention_backward as plain
from services.gpu_worker.kernels.paged_attention import PagedBatch, Run, paged_attention
from services.gpu_worker.kernels.triton import attention_backward as fused
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape
from tests.kernels.paged_batches import PagedCase, attention, make_case
from tests.kernels.triton.twins import ACCURACY, DTYPES, relative_error

TOLERANCES = {
    fused: {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2},
    # without torch's kernel for CPUs scores are rounded
    plain: {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2},
}
assert all(tolerance < ACCURACY[dtype] for dtype, tolerance in TOLERANCES[fused].items())
PACKED = (Run(5, 17), Run(20, 37, first_key=17), Run(3, 40, first_key=37))


def gradients(form: object, case: PagedCase, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, and what sums over keys and values that were 1 before have become."""
    shape = case.batch.num_kv_heads, 3 + max(run.num_keys for run in case.batch.runs), case.cache.head_dim
    dk, dv = (torch.ones(shape, device=case.q.device) for _ in range(2))
    out, lse = paged_attention(case.q, case.keys, case.values, case.batch)
    saved = d_out, case.q, case.keys, case.values, out, lse, case.batch
    dq = form.paged_attention_backward(*saved, dk, dv)
    assert dq.dtype == case.q.dtype
    return dq, dk, dv


def check(case: PagedCase) -> None:
    """Both forms give autograd's dQ, and add autograd's dK and dV."""
    random = torch.Generator().manual_seed(1)
    d_out = torch.randn(len(case.q), case.q.shape[1] * case.q.shape[2], generator=random).to(case.q)
    for form in (fused, plain):
        dq, dk, dv = gradients(form, case, d_out)
        tolerance = TOLERANCES[form][case.q.dtype]
        unseen = torch.ones(dk.shape[1], dtype=torch.bool, device=dk.device)
        for run, rows in case.runs():
            inputs = [t.requires_grad_() for t in (case.q[rows].double(), *case.dense(run))]
            expected, _ = attention(*inputs)
            exact = torch.autograd.grad(expected, inputs, d_out[rows].double().view_as(expected))
            own = slice(run.first_key, run.num_keys)
            unseen[own] = False
            for ours, theirs in zip((dq[rows], dk[:, own] - 1, dv[:, own] - 1), exact, strict=True):
                assert relative_error(ours, theirs, least=1.0) < tolerance, (form.__name__, run)
        assert (dk[:, unseen] == 1).all()
        assert (dv[:, unseen] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 5, 7, 8])
def test_packed_examples_have_gradients_of_their_own(
    group: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(make_case(PACKED, group=group, num_kv_heads=1 + (group < 5), dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 16, 17])
def test_windows_may_end_on_either_side_of_a_tile(
    num_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    for before in (0, 31):
        check(make_case([Run(num_tokens, num_tokens + before)], num_kv_heads=1, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_longer_than_every_tile_need_masks_at_the_diagonal_alone(
    dtype: torch.dtype, device: torch.device
) -> None:
    check(make_case([Run(30, 140, first_key=5)], num_kv_heads=1, group=5, dtype=dtype, device=device))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128])
def test_heads_may_have_any_size(head_dim: int, device: torch.device) -> None:
    check(make_case([Run(9, 20), Run(2, 26, first_key=20)], group=2, head_dim=head_dim, device=device))


def test_windows_from_the_last_to_the_first_add_up_to_the_whole_sequence(device: torch.device) -> None:
    whole = make_case(PACKED, group=5, num_kv_heads=1, device=device)
    d_out = torch.randn(40, 80, generator=torch.Generator().manual_seed(2)).to(device)
    whole.batch = batch_of(whole, 0, 40)
    whole.q = torch.randn(40, 5, 16, generator=torch.Generator().manual_seed(3)).to(device)
    dq, dk, dv = gradients(fused, whole, d_out)
    summed = torch.ones_like(dk), torch.ones_like(dv)
    for start, end in ((31, 40), (17, 31), (12, 17), (0, 12)):
        window = replace(whole, q=whole.q[start:end], batch=batch_of(whole, start, end))
        out, lse = paged_attention(window.q, window.keys, window.values, window.batch)
        part = fused.paged_attention_backward(
            d_out[start:end], window.q, window.keys, window.values, out, lse, window.batch, *summed
        )
        assert relative_error(part, dq[start:end].double()) < TOLERANCES[fused][torch.float32]
    assert relative_error(summed[0], dk.double()) < TOLERANCES[fused][torch.float32]
    assert relative_error(summed[1], dv.double()) < TOLERANCES[fused][torch.float32]


def batch_of(case: PagedCase, start: int, end: int) -> PagedBatch:
    """The window [start, end) of a sequence that packs examples of 17, 20 and 3 tokens."""
    examples = [(begin, max(start, begin), min(end, stop)) for begin, stop in ((0, 17), (17, 37), (37, 40))]
    runs = [Run(b - a, b, first_key=begin) for begin, a, b in examples if a < b]
    return PagedBatch.make(runs, case.tables, 1, 16, case.q.device)


def test_gradients_are_the_same_every_time(device: torch.device) -> None:
    case = make_case(PACKED, group=7, num_kv_heads=1, dtype=torch.float16, device=device)
    d_out = torch.randn(28, 112, generator=torch.Generator().manual_seed(2)).to(case.q)
    for first, second in zip(gradients(fused, case, d_out), gradients(fused, case, d_out), strict=True):
        assert torch.equal(first, second)


def test_sums_that_do_not_fit_are_named(device: torch.device) -> None:
    case = make_case([Run(3, 20)], device=device)
    d_out = torch.zeros(3, 128, device=device)
    out, lse = paged_attention(case.q, case.keys, case.values, case.batch)
    dv = torch.zeros(2, 20, 16, device=device)
    for dk in (dv[:, :19], dv.half(), dv[:1], dv.transpose(0, 1).contiguous().transpose(0, 1)):
        with pytest.raises(UnsupportedShape, match="dk"):
            fused.paged_attention_backward(
                d_out, case.q, case.keys, case.values, out, lse, case.batch, dk, dv
            )


def test_a_window_over_two_sequences_is_refused(device: torch.device) -> None:
    case = make_case([Run(3, 20), Run(3, 20, table=1)], device=device)
    with pytest.raises(ValueError, match="one block table"):
        gradients(fused, case, torch.zeros(6, 128, device=device))
