"""The plain form of paged attention, forward and backward, in float64; batches that make no sense are refused."""

from __future__ import annotations

import pytest
import torch

from services.gpu_worker.kernels.paged_attention import PagedBatch, Run, paged_attention
from services.gpu_worker.kernels.paged_attention_backward import paged_attention_backward
from tests.kernels.paged_batches import attention, make_case
from tests.kernels.triton.twins import relative_error

WINDOW = (Run(5, 17), Run(20, 37, first_key=17), Run(3, 40, first_key=37))


@pytest.mark.parametrize("group", [1, 5])
def test_each_run_attends_to_its_own_keys(group: int) -> None:
    runs = [*WINDOW, Run(1, 33, table=1), Run(4, 4, table=2)]
    case = make_case(runs, group=group, dtype=torch.float64)
    out, lse = paged_attention(case.q, case.keys, case.values, case.batch)
    for run, rows in case.runs():
        expected, expected_lse = attention(case.q[rows], *case.dense(run))
        assert relative_error(out[rows], expected.flatten(1)) < 1e-14
        torch.testing.assert_close(lse[rows], expected_lse)


@pytest.mark.parametrize("group", [1, 5])
def test_gradients_of_packed_examples_equal_autograd(group: int) -> None:
    case = make_case(WINDOW, group=group, dtype=torch.float64)
    out, lse = paged_attention(case.q, case.keys, case.values, case.batch)
    dk, dv = (torch.ones(2, 40, 16, dtype=torch.float64) for _ in range(2))
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dq = paged_attention_backward(d_out, case.q, case.keys, case.values, out, lse, case.batch, dk, dv)
    for run, rows in case.runs():
        inputs = [t.requires_grad_() for t in (case.q[rows].clone(), *case.dense(run))]
        expected, _ = attention(*inputs)
        exact = torch.autograd.grad(expected, inputs, d_out[rows].view_as(expected))
        own = slice(run.first_key, run.num_keys)
        for ours, theirs in zip((dq[rows], dk[:, own] - 1, dv[:, own] - 1), exact, strict=True):
            assert relative_error(ours, theirs) < 1e-13


@pytest.mark.parametrize(
    "run", [Run(0, 4), Run(3, 2), Run(3, 8, first_key=6), Run(1, 33), Run(1, 4, first_key=-1)]
)
def test_a_run_that_its_table_does_not_hold_is_named(run: Run) -> None:
    with pytest.raises(ValueError, match=r"run 1: .* its block table of 32 tokens"):
        PagedBatch.make([Run(1, 1), run], [[0, 1]], 2, 16, torch.device("cpu"))
