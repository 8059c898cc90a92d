"""Tokenised examples and the order in which a job sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

KINDS = {"tokens": "i", "mask": "u", "offsets": "i"}  # numpy's letters for signed and unsigned integers


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
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise InvalidDataset(f"the dataset cannot be read: {error}") from error
        for name, kind in KINDS.items():
            if name not in tensors:
                raise InvalidDataset(f"no tensor {name!r} in the dataset")
            if tensors[name].dtype.kind != kind or tensors[name].ndim != 1:
                raise InvalidDataset(
                    f"{name!r} must have one dimension of integers, not {tensors[name].dtype} "
                    f"of shape {list(tensors[name].shape)}"
                )
        dataset = cls(tensors["tokens"], tensors["mask"], tensors["offsets"])
        ends = dataset.offsets[[0, -1]].tolist() if len(dataset.offsets) > 1 else None
        if ends != [0, len(dataset.tokens)]:
            raise InvalidDataset("the dataset's offsets do not match its tokens")
        if len(dataset.mask) != len(dataset.tokens) or (np.diff(dataset.offsets) < 2).any():
            raise InvalidDataset("every example needs at least two tokens and a mask for each")
        return dataset

    def check(self, vocab_size: int, max_positions: int) -> None:
        """Raises InvalidDataset for what the model cannot compute."""
        for token in (int(self.tokens.min()), int(self.tokens.max())):
            if not 0 <= token < vocab_size:
                raise InvalidDataset(f"token {token} is not in [0, {vocab_size})")
        longest = max(self.lengths())
        if longest > max_positions:
            raise InvalidDataset(
                f"an example of {longest} tokens exceeds the model's {max_positions} positions"
            )

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
