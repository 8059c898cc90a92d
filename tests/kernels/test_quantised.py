"""Quantised linears against products with the weight that they stand for, and the rounding itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from services.gpu_worker.kernels import quantised
from services.gpu_worker.kernels.quantised import SCHEMES, QuantisedLinear, Scheme, quantise

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The products' own rounding. torch's kernels in bfloat16 multiply by codes and scales, before `dense` rounds
# their product to bfloat16.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = ((96, 64), (64, 192), (128, 320), (22, 128), (192, 576))


def make_weight(out: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out * width)
    return (torch.randn(out, width, generator=generator, dtype=torch.float64) * 0.1).to(dtype)


def make_input(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(
        dtype
    )


def assert_close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within the dtype's tolerance of the largest element of the exact result."""
    assert ours.shape == exact.shape
    if exact.numel():
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < TOLERANCE[ours.dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_equal_those_with_the_dense_weight(
    scheme: Scheme, dtype: torch.dtype, shape: tuple[int, int], bias: bool
) -> None:
    offset = make_input(1, shape[0], dtype)[0] if bias else None
    linear = quantise(make_weight(*shape, dtype), offset, scheme=scheme)
    dense = linear.dense().double()
    assert (linear.out_features, linear.in_features) == tuple(dense.shape) == shape
    assert linear.dense().dtype == dtype
    for rows in (0, 1, 2, 7, 32, 33, 64, 65, 200):
        x, dy = make_input(rows, shape[1], dtype), make_input(rows, shape[0], dtype)
        y = x.double() @ dense.T + (0 if offset is None else offset.double())
        assert_close(linear.forward(x), y)
        for some in (1, 3, shape[0] - 1, shape[0]):
            assert_close(linear.forward_rows(x, some), y[:, :some])
        assert_close(linear.input_gradient(dy), dy.double() @ dense)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_input_that_is_a_view_gives_the_same_product(scheme: Scheme) -> None:
    linear = quantise(make_weight(64, 64, torch.bfloat16), scheme=scheme)
    x = make_input(5, 128, torch.bfloat16)[:, ::2]
    assert torch.equal(linear.forward(x), linear.forward(x.contiguous()))


@pytest.mark.parametrize("width", [7, 24, 100])
def test_widths_that_the_int8_kernel_misreads_are_multiplied_right(width: int) -> None:
    linear = quantise(make_weight(64, width, torch.bfloat16), scheme="int8")
    x = make_input(3, width, torch.bfloat16)
    assert_close(linear.forward(x), x.double() @ linear.dense().double().T)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cutting_the_weight_into_pieces_changes_no_bit(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = make_weight(192, 320, torch.float64), make_input(1, 192, torch.float64)[0]
    whole = quantise(weight, bias, scheme=scheme)
    x, dy = make_input(40, 320, torch.float64), make_input(40, 192, torch.float64)
    expected = whole.forward(x), whole.forward_rows(x, 100), whole.input_gradient(dy), whole.dense()
    monkeypatch.setattr(quantised, "PIECE", 5000)
    cut = quantise(weight, bias, scheme=scheme)
    found = cut.forward(x), cut.forward_rows(x, 100), cut.input_gradient(dy), cut.dense()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert torch.equal(cut.dense(), whole.dense())


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.size_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = isinstance(result, torch.Tensor) and not func.is_view
        if own and not any(result is a for a in args) and result is not (kwargs or {}).get("out"):
            self.size_bytes = max(self.size_bytes, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_product_needs_more_than_a_piece_of_the_dense_weight(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "PIECE", 1 << 15)
    linear = quantise(make_weight(512, 512, torch.float32), scheme=scheme)
    x = make_input(4, 512, torch.float32)
    with LargestResult() as largest:
        linear.forward(x)
        linear.forward_rows(x, 300)
        linear.input_gradient(x)
    assert 0 < largest.size_bytes <= 4 << 15
    with LargestResult() as largest:
        linear.dense()
    assert largest.size_bytes >= 4 * 512 * 512


@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_rows_in_bfloat16_on_a_cpu_take_the_kernels(scheme: Scheme) -> None:
    assert quantise(make_weight(128, 64, torch.bfloat16), scheme=scheme).kernel_rows > 0
    assert quantise(make_weight(128, 64, torch.float32), scheme=scheme).kernel_rows == 0


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("centre", [0.0, 0.5, -3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_is_within_half_a_scale(
    scheme: Scheme, dtype: torch.dtype, centre: float, spread: float
) -> None:
    """Half a scale, and what `dense` loses by rounding to the model's dtype."""
    weight = (make_input(64, 128, torch.float64) * spread + centre).to(dtype)
    linear = quantise(weight, scheme=scheme)
    error = (weight.double() - linear.dense().double()).abs()
    rounding = torch.finfo(dtype).eps * weight.double().abs().amax(1, keepdim=True)
    assert bool((error <= scales_of(linear) / 2 + rounding).all())


def scales_of(linear: QuantisedLinear) -> torch.Tensor:
    """Of every weight, float64 [out, in]."""
    if isinstance(linear, quantised.Int8Linear):
        return linear._scales.double()[:, None].expand(-1, linear.in_features)
    assert isinstance(linear, quantised.Int4Linear)
    return linear._scales_zeros[..., 0].T.double().repeat_interleave(linear.column_unit, 1)


def test_int8_scales_follow_each_row_and_int4_scales_each_group() -> None:
    weight = make_weight(64, 128, torch.float32)
    int8 = scales_of(quantise(weight, scheme="int8"))
    torch.testing.assert_close(int8[:, 0], weight.double().abs().amax(1) / 127)
    groups = weight.double().view(64, 4, 32)
    int4 = scales_of(quantise(weight, scheme="int4", group_size=32))
    torch.testing.assert_close(int4[:, ::32], (groups.amax(-1) - groups.amin(-1)) / 15, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_lie_on_the_levels_survive(scheme: Scheme, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = {"int8": 127, "int4": 7}[scheme]
    codes = torch.randint(-levels - (scheme == "int4"), levels + 1, (64, 128), generator=generator)
    codes[:, ::32], codes[:, 1::32] = levels, -levels - (scheme == "int4")
    weight = codes.to(dtype) / 64
    assert torch.equal(quantise(weight, scheme=scheme).dense(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_of_zeros_stays_zero(scheme: Scheme, dtype: torch.dtype) -> None:
    linear = quantise(torch.zeros(64, 64, dtype=dtype), scheme=scheme)
    assert not linear.dense().any()
    assert not linear.forward(make_input(3, 64, dtype)).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantising_twice_gives_the_same_bits(scheme: Scheme) -> None:
    first, second = (quantise(make_weight(64, 128, torch.bfloat16), scheme=scheme).dense() for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_size_counts_codes_scales_zeros_and_bias(dtype: torch.dtype) -> None:
    out, width, group = 96, 128, 64
    weight, bias = make_weight(out, width, dtype), make_input(1, out, dtype)[0]
    assert quantise(weight, bias, scheme="int8").size_bytes == out * width + 2 * out * dtype.itemsize
    groups = width // group
    expected = out * width // 2 + 2 * out * groups * dtype.itemsize + out * dtype.itemsize
    assert quantise(weight, bias, scheme="int4", group_size=group).size_bytes == expected


@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_smaller_groups_round_less(group_size: int) -> None:
    weight = make_weight(64, 256, torch.float32)
    errors = [
        float((quantise(weight, scheme="int4", group_size=size).dense() - weight).norm())
        for size in (group_size, 2 * group_size)
    ]
    assert errors[0] < errors[1]


def test_a_width_that_is_no_multiple_of_the_group_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="100 input features are no multiple of the group size 32"):
        quantise(make_weight(64, 100, torch.float32), scheme="int4")


def test_an_odd_number_of_rows_is_refused_in_int4() -> None:
    with pytest.raises(ValueError, match="cannot hold 63 output features"):
        quantise(make_weight(63, 64, torch.float32), scheme="int4")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_that_is_not_finite_is_refused(scheme: Scheme) -> None:
    weight = torch.ones(64, 64)
    weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight, scheme=scheme)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="'int3' is not one of int8, int4"):
        quantise(make_weight(64, 64, torch.float32), scheme="int3")  # type: ignore[arg-type]
