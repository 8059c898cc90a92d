"""Draws a token for each row by inverting its distribution at a number that a seed and a position give.

The twin for GPUs, `kernels/triton/sampling.py`, needs no sorting. Both draw what `engine/sampler.py` draws: the
filters in its order, and the same walk through the tokens, in the vocabulary's order without filters and by
falling probability with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.gpu_worker.kernels.transfer import to_device

GREEDY_BELOW = 1e-5  # temperatures that a division would overflow at


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each of R rows chooses; all [R], on the device of the logits."""

    temperature: Tensor  # float32; below GREEDY_BELOW the most likely token
    top_k: Tensor  # int32; 0: all
    top_p: Tensor  # float32; 1: all
    min_p: Tensor  # float32; 0: all
    seed: Tensor  # int64, the 64 bits of an unsigned number
    position: Tensor  # int64

    @classmethod
    def make(
        cls,
        temperature: list[float],
        top_k: list[int],
        top_p: list[float],
        min_p: list[float],
        seed: list[int],
        position: list[int],
        device: torch.device,
    ) -> SamplingRows:
        """In one copy to the device. A seed counts modulo 2^64."""
        signed = [(s + (1 << 63)) % (1 << 64) - (1 << 63) for s in seed]
        integers = torch.tensor([signed, position, top_k], dtype=torch.int64)
        floats = torch.tensor([temperature, top_p, min_p], dtype=torch.float32)
        packed = torch.cat((integers.view(-1).view(torch.int32), floats.view(-1).view(torch.int32)))
        sent = to_device(packed, device)
        integers = sent[: 6 * len(seed)].view(torch.int64).view(3, -1)
        floats = sent[6 * len(seed) :].view(torch.float32).view(3, -1)
        top = integers[2].clamp(max=(1 << 31) - 1).to(torch.int32)
        return cls(floats[0], top, floats[1], floats[2], integers[0], integers[1])


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) that depends on its arguments alone: splitmix64's finaliser; float64."""
    z = seed * _signed(0x9E3779B97F4A7C15) + (position + 1) * _signed(0xD1B54A32D192ED03)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(z ^ _shifted(z, 31), 11).double() / (1 << 53)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, with zeros: torch's shift of a signed number drags the sign along."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def sample_tokens(logits: Tensor, rows: SamplingRows) -> Tensor:
    """int64 [R] of float32 `logits` [R, V]. A row whose largest logit is not finite gets some token."""
    best, greedy = logits.max(-1)
    temperature = rows.temperature.clamp(min=GREEDY_BELOW)[:, None]
    probs = torch.softmax(logits / temperature, -1).double()
    falling, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    filtered = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    kept = torch.where(_kept(falling, rows), falling, 0)
    in_order = torch.where(filtered[:, None], kept, probs)
    cumulative = in_order.cumsum(-1)
    target = uniform(rows.seed, rows.position)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)
    drawn = torch.where(filtered, ids.gather(1, index)[:, 0], index[:, 0])
    is_random = (rows.temperature > GREEDY_BELOW) & best.isfinite()
    return torch.where(is_random, drawn, greedy)


def _kept(falling: Tensor, rows: SamplingRows) -> Tensor:
    """Which of the falling probabilities stay: of the `top_k` first, those before which less than `top_p` lies,
    and of these the ones of at least `min_p` times the first."""
    num_tokens = falling.shape[1]
    rank = torch.arange(num_tokens, device=falling.device)
    most = torch.where(rows.top_k > 0, rows.top_k, num_tokens)[:, None]
    share = torch.where(rank < most, falling, 0)
    share = share / share.sum(-1, keepdim=True)
    before = share.cumsum(-1) - share
    keep = (rank < most) & ((before < rows.top_p[:, None]) | (rows.top_p >= 1)[:, None])
    return keep & (falling >= rows.min_p.double()[:, None] * falling[:, :1])
