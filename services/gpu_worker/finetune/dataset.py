"""Tokenised examples and the order in which a job sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load


class InvalidDataset(ValueError):
    """The file of tokenised examples is damaged or empty."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Example i is `tokens[offsets[i]:offsets[i + 1]]`; `mask` is 1 where a token is a training target."""

    tokens: NDArray[np.int32]  # [N]
    mask: NDArray[np.uint8]  # [N]
    offsets: NDArray[np.int64]  # [num_examples + 1]

    @classmethod
    def from_bytes(cls, data: bytes) -> Dataset:
        """Reads a safetensors file with `tokens`, `mask` and `offsets`."""
        tensors = load(data)
        missing = {"tokens", "mask", "offsets"} - tensors.keys()
        if missing:
            raise InvalidDataset(f"no tensor {sorted(missing)[0]!r} in the dataset")
        dataset = cls(tensors["tokens"], tensors["mask"], tensors["offsets"])
        if len(dataset.offsets) < 2 or dataset.offsets[-1] != len(dataset.tokens) or len(dataset) < 1:
            raise InvalidDataset("the dataset's offsets do not match its tokens")
        if len(dataset.mask) != len(dataset.tokens) or (np.diff(dataset.offsets) < 2).any():
            raise InvalidDataset("every example needs at least two tokens and a mask for each")
        return dataset

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> list[int]:
        return [int(n) for n in np.diff(self.offsets)]

    def example(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Tokens [n] and labels [n]: the next token where it is a target, else -100; shifted once, here."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        tokens, mask = self.tokens[rows], self.mask[rows]
        labels = np.full(len(tokens), -100, np.int64)
        labels[:-1] = np.where(mask[1:] == 1, tokens[1:], -100)
        return tokens, labels

    def num_targets(self) -> list[int]:
        """Labelled tokens of each example (its first token is never predicted)."""
        counts = np.add.reduceat(self.mask.astype(np.int64), self.offsets[:-1])
        return [int(n) for n in counts - self.mask[self.offsets[:-1]]]


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """A permutation that depends on (seed, epoch) alone, so that a resumed job sees what it would have seen."""
    return [int(i) for i in np.random.default_rng((seed, epoch)).permutation(num_examples)]
