"""Gradient of `paged_attention` for windows of one training sequence, on any device.

`kernels/triton/attention_backward.py` has the same function for GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.gpu_worker.kernels.attention_backward import window_attention_backward
from services.gpu_worker.kernels.paged_attention import PagedBatch, gather, run_mask, run_pages


def paged_attention_backward(
    d_out: Tensor,
    q_NHE: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse_NH: Tensor,
    batch: PagedBatch,
    dk_GTE: Tensor,
    dv_GTE: Tensor,
) -> Tensor:
    """Returns dQ [N, H, E], complete, and adds this window's part to the sums over keys and values.

    `d_out`, `out` [N, H * E]; the rest as the forward had and gave them. All runs are of one block table, and
    no key is in two of them: token t of the table is row t of `dk_GTE` and `dv_GTE`, which are float32.
    """
    group = q_NHE.shape[1] // batch.num_kv_heads
    dq = torch.empty_like(q_NHE)
    for run, rows, pages in run_pages(batch):
        own = gather(keys, pages, run, batch), gather(values, pages, run, batch)
        mask = run_mask(run, group, q_NHE)
        dq[rows], dk, dv = window_attention_backward(
            d_out[rows], q_NHE[rows], *own, out[rows], lse_NH[rows], mask
        )
        places = slice(run.first_key, run.num_keys)
        dk_GTE[:, places] += dk
        dv_GTE[:, places] += dv
    return dq
