"""Both forms of window attention against autograd, and each other."""

from __future__ import annotations

import pytest
import torch

from services.gpu_worker.kernels import attention, attention_backward
from services.gpu_worker.kernels.attention import causal_mask, decode_attention, group_heads, length_mask

FORMS = {
    "flash": (attention._flash, attention_backward._flash_backward),
    "math": (attention._math, attention_backward._math_backward),
}


def reference(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[N, H, E] by torch's own attention with expanded heads; queries are the last rows of the keys."""
    n, h, _ = q.shape
    group = h // keys.shape[0]
    hidden = torch.arange(keys.shape[1])[None] > torch.arange(keys.shape[1] - n, keys.shape[1])[:, None]
    mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill(hidden, float("-inf"))
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1),
        keys.repeat_interleave(group, 0),
        values.repeat_interleave(group, 0),
        attn_mask=mask,
    )
    return out.transpose(0, 1)


@pytest.mark.parametrize("group", [1, 4, 5, 7, 8])
@pytest.mark.parametrize("form", FORMS)
def test_window_attention_and_its_gradient_equal_autograd(form: str, group: int) -> None:
    torch.manual_seed(group)
    n, s, g, e = 9, 23, 2, 16
    q = torch.randn(n, g * group, e, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(g, s, e, dtype=torch.float64, requires_grad=True)
    values = torch.randn(g, s, e, dtype=torch.float64, requires_grad=True)
    expected = reference(q, keys, values)
    d_out = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, keys, values), d_out)

    forward, backward = FORMS[form]
    mask = causal_mask(n, s, group, q.dtype, q.device)
    with torch.no_grad():
        grouped = [group_heads(t, g) for t in (q, d_out)]
        out, lse = forward(grouped[0], keys, values, mask)
        dq, dk, dv = backward(grouped[1], grouped[0], keys, values, out, lse, mask)
    torch.testing.assert_close(out, group_heads(expected, g))
    for ours, theirs in ((dq, group_heads(gradients[0], g)), (dk, gradients[1]), (dv, gradients[2])):
        torch.testing.assert_close(ours, theirs)


def test_decode_attention_hides_what_lies_behind_each_length() -> None:
    torch.manual_seed(0)
    b, h, g, e, t = 3, 6, 2, 16, 12
    lengths = torch.tensor([1, 7, 12])
    q, keys, values = torch.randn(b, h, e), torch.randn(b * g, t, e), torch.randn(b * g, t, e)
    out = decode_attention(q, keys, values, length_mask(lengths, t, g, q.dtype))
    for i, length in enumerate(lengths.tolist()):
        own = slice(i * g, (i + 1) * g)
        alone = reference(q[i : i + 1], keys[own, :length], values[own, :length])
        torch.testing.assert_close(out[i], alone.flatten(), atol=1e-5, rtol=1e-5)
