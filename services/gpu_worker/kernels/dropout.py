"""Dropout whose masks are a function of a seed and the place, so that windows of any cut, the recomputation in
the backward and a resumed job all see the same one, and traffic beside it changes nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 64  # tokens that one seed covers


@dataclass(frozen=True, slots=True)
class Dropout:
    """Of one training sequence: `seed` names the job's seed, the optimizer step and the sequence."""

    rate: float
    seed: str

    def mask(self, layer: int, module: str, tokens: slice, x: Tensor) -> Tensor:
        """Zeros and 1 / (1 - rate) for the rows [tokens] of the sequence, in the shape of `x` [n, width]."""
        first, last = tokens.start // ROWS, (tokens.stop - 1) // ROWS
        blocks = [self._block(layer, module, index, x) for index in range(first, last + 1)]
        offset = tokens.start - first * ROWS
        return torch.cat(blocks)[offset : offset + tokens.stop - tokens.start]

    def _block(self, layer: int, module: str, index: int, x: Tensor) -> Tensor:
        name = f"{self.seed}|{layer}|{module}|{index}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest())
        generator = torch.Generator(x.device).manual_seed(seed)
        kept = x.new_empty(ROWS, x.shape[1], dtype=torch.float32).bernoulli_(
            1 - self.rate, generator=generator
        )
        return kept.div_(1 - self.rate).to(x.dtype)
