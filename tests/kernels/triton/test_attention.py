"""Paged attention against its definition in float64, for all that a batch may hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.gpu_worker.kernels import paged_attention as plain
from services.gpu_worker.kernels.paged_attention import Run
from services.gpu_worker.kernels.triton import attention as fused
from services.gpu_worker.kernels.triton.attention_tiles import Shapes, forward_tiles
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape
from tests.kernels.paged_batches import PagedCase, attention, make_case
from tests.kernels.triton.twins import ACCURACY, DTYPES, relative_error

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
assert all(tolerance < ACCURACY[dtype] for dtype, tolerance in TOLERANCES.items())
MIXED = (  # a training window over three packed examples, two pieces of prompts, decodes
    Run(5, 17),
    Run(20, 37, first_key=17),
    Run(3, 40, first_key=37),
    Run(33, 33, table=1),
    Run(9, 45, table=2),
    Run(1, 1, table=3),
    Run(1, 64, table=4),
    Run(1, 65, table=5),
)


def check(case: PagedCase) -> None:
    """Both forms give every run's output and log-sum-exp."""
    tolerance = TOLERANCES[case.q.dtype]
    for form in (fused, plain):
        out, lse = form.paged_attention(case.q, case.keys, case.values, case.batch)
        assert out.dtype == case.q.dtype
        assert lse.dtype == torch.float32
        for run, rows in case.runs():
            expected, expected_lse = attention(case.q[rows].double(), *case.dense(run))
            assert relative_error(out[rows], expected.flatten(1), least=1.0) < tolerance, (form.__name__, run)
            assert (lse[rows] - expected_lse).abs().max() < max(tolerance, 1e-5), (form.__name__, run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 5, 7, 8])
def test_decodes_prompts_and_packed_windows_share_one_batch(
    group: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(make_case(MIXED, group=group, dtype=dtype, device=device))


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 7, 8, 9, 31, 33])
def test_queries_may_end_on_either_side_of_a_tile(num_tokens: int, device: torch.device) -> None:
    runs = [Run(num_tokens, num_tokens + before, table=i) for i, before in enumerate((0, 1, 15, 31))]
    check(make_case(runs, num_kv_heads=1, device=device))


@pytest.mark.parametrize("num_keys", [15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_keys_may_end_on_either_side_of_a_tile(num_keys: int, device: torch.device) -> None:
    check(make_case([Run(1, num_keys), Run(9, num_keys, table=1)], num_kv_heads=1, device=device))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128])
def test_heads_may_have_any_size(head_dim: int, device: torch.device) -> None:
    check(make_case([Run(1, 35), Run(9, 20, table=1)], group=2, head_dim=head_dim, device=device))


@pytest.mark.parametrize("block_size", [1, 8, 24, 32])
def test_blocks_may_have_any_size(block_size: int, device: torch.device) -> None:
    check(make_case([Run(1, 35), Run(9, 40, first_key=3, table=1)], block_size=block_size, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_are_read_in_parts(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = Shapes(dtype, 1, 4, 16, 16).forward_forms()
    cut = replace(small, part=64), replace(large, part=128)
    monkeypatch.setattr(Shapes, "forward_forms", lambda shapes: cut)
    runs = [Run(1, 63), Run(1, 65, table=1), Run(4, 194, table=2), Run(12, 300, first_key=7, table=3)]
    case = make_case(runs, num_kv_heads=1, dtype=dtype, device=device)
    num_parts = [tiles.num_parts for _, tiles in forward_tiles(case.batch, Shapes.of(*arguments(case)))]
    assert num_parts[0] == 2 + 4
    assert num_parts[1] >= 3
    check(case)


def test_a_row_does_not_depend_on_who_else_is_in_the_batch(device: torch.device) -> None:
    case = make_case(MIXED, device=device)
    together, _ = fused.paged_attention(*arguments(case))
    for run, rows in case.runs():
        alone = plain.PagedBatch.make([run], case.tables, 2, 16, device)
        out, _ = fused.paged_attention(case.q[rows], case.keys, case.values, alone)
        assert torch.equal(out, together[rows])


def test_queries_may_be_a_part_of_wider_rows(device: torch.device) -> None:
    case = make_case(MIXED, device=device)
    wide = torch.zeros(len(case.q), 12, 16, device=device)
    wide[:, :8] = case.q
    case.q = wide[:, :8]
    check(case)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_dim": 320}, "heads of up to 256"),
        ({"group": 40, "num_kv_heads": 1}, "1 to 32 of them"),
        ({"dtype": torch.float64}, r"not queries \[1, 8, 16\] torch.float64"),
    ],
)
def test_a_shape_without_a_kernel_is_named(change: dict, said: str, device: torch.device) -> None:
    case = make_case([Run(1, 3)], **{"device": device, **change})
    with pytest.raises(UnsupportedShape, match=said):
        fused.paged_attention(*arguments(case))


def test_rows_that_a_batch_does_not_have_are_named(device: torch.device) -> None:
    case = make_case([Run(2, 3)], device=device)
    with pytest.raises(UnsupportedShape, match="a batch of 2 rows"):
        fused.paged_attention(case.q[:1], case.keys, case.values, case.batch)


def arguments(case: PagedCase) -> tuple:
    return case.q, case.keys, case.values, case.batch
