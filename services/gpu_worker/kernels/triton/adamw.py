"""AdamW on a job's flat parameters in one pass over memory; twin in `kernels/adamw.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels.adamw import AdamW
from services.gpu_worker.kernels.triton.configure import configure
from services.gpu_worker.kernels.triton.rows import check_floats, check_shape
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape

BLOCK = 1024  # numbers that a program moves


@triton.jit(do_not_specialize=["size"])
def _adamw_kernel(
    masters_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    copy_ptr,
    clip_ptr,
    size,
    step_size,
    correction,
    kept,
    epsilon,
    beta1_rest,
    beta2,
    beta2_rest,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`rest` is what is missing to one, which float32 would not get from a beta near it."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    clip = tl.load(clip_ptr)
    inside = place < tl.where(clip == clip, size, 0)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0) * clip
    exp_avg = tl.load(exp_avg_ptr + place, mask=inside, other=0.0)
    exp_avg += beta1_rest * (grad - exp_avg)
    tl.store(exp_avg_ptr + place, exp_avg, mask=inside)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + place, mask=inside, other=0.0)
    exp_avg_sq = beta2 * exp_avg_sq + beta2_rest * grad * grad
    tl.store(exp_avg_sq_ptr + place, exp_avg_sq, mask=inside)
    scale = tl.sqrt_rn(exp_avg_sq) / correction + epsilon
    masters = tl.load(masters_ptr + place, mask=inside, other=0.0)
    masters = masters * kept - step_size * exp_avg / scale
    tl.store(masters_ptr + place, masters, mask=inside)
    if HAS_COPY:
        tl.store(copy_ptr + place, masters.to(copy_ptr.dtype.element_ty), mask=inside)


def adamw_(
    masters: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    update: AdamW,
    clip: Tensor | float = 1.0,
    copy: Tensor | None = None,
) -> None:
    """Moves `masters` [n] and the moments [n]; `grad` [n] counts `clip` times and stays as it is.

    `clip` may be a float32 number on the device, so that nobody waits for the norm that it comes from; where that is
    NaN, nothing moves, nor is anything copied. `copy` [n], of any floating type, gets the moved masters.
    """
    for name, tensor in {
        "masters": masters,
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
    }.items():
        check_shape(name, tensor, (masters.numel(),))
        _check_flat(name, tensor, (torch.float32,))
    if copy is not None:
        check_shape("copy", copy, (masters.numel(),))
        check_floats("copy", copy)
        _check_flat("copy", copy, (copy.dtype,))
    if not isinstance(clip, Tensor):
        clip = torch.full((), clip, dtype=torch.float32, device=masters.device)
    _check_flat("clip", clip, (torch.float32,))
    if masters.numel():
        _adamw_kernel[(triton.cdiv(masters.numel(), BLOCK),)](
            masters, grad, exp_avg, exp_avg_sq, masters if copy is None else copy, clip, masters.numel(),
            update.step_size, update.correction, update.kept, update.epsilon,
            1 - update.beta1, update.beta2, 1 - update.beta2, HAS_COPY=copy is not None, BLOCK=BLOCK,
        )  # fmt: skip


def _check_flat(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes or not x.is_contiguous():
        raise UnsupportedShape(f"{name} {list(x.shape)} has to be dense {dtypes[0]} and is {x.dtype}")


_NUMBERS = ("step_size", "correction", "kept", "epsilon", "beta1_rest", "beta2", "beta2_rest")
CONFIGURATIONS = [
    configure(
        f"adamw-{'copy' if has_copy else 'alone'}",
        _adamw_kernel,
        {"HAS_COPY": has_copy, "BLOCK": BLOCK},
        torch.float32,
        types={"copy_ptr": torch.bfloat16, **dict.fromkeys(_NUMBERS, "fp32")},
    )
    for has_copy in (False, True)
]
