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

    def mask(
        self, layer: int, module: str, tokens: slice, x: Tensor, part: tuple[int, int] = (0, 1)
    ) -> Tensor:
        """Zeros and 1 / (1 - rate) for the rows [tokens] of the sequence, in the shape of `x` [n, width].

        `part` says which of how many parts of the features `x` is: together they have one mask.
        """
        first, last = tokens.start // ROWS, (tokens.stop - 1) // ROWS
        width, (index, count) = x.shape[1], part
        blocks = [self._block(layer, module, i, x, width * count) for i in range(first, last + 1)]
        offset = tokens.start - first * ROWS
        rows = torch.cat(blocks)[offset : offset + tokens.stop - tokens.start]
        return rows[:, index * width : (index + 1) * width]

    def _block(self, layer: int, module: str, index: int, x: Tensor, width: int) -> Tensor:
        name = f"{self.seed}|{layer}|{module}|{index}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest())
        generator = torch.Generator(x.device).manual_seed(seed)
        kept = x.new_empty(ROWS, width, dtype=torch.float32).bernoulli_(1 - self.rate, generator=generator)
        return kept.div_(1 - self.rate).to(x.dtype)
