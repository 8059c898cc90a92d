"""Training sequences: examples packed end to end, filled to few different sizes. No tensors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class Examples:
    """Lengths of a dataset's examples in tokens, and how many of them carry a label."""

    lengths: list[int]
    num_targets: list[int]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """Examples packed end to end: example j is the tokens [boundaries[j], boundaries[j + 1]). The last `filler` tokens
    are nobody's and teach nothing: with them sequences, and so windows, have few different sizes, for each of which
    libraries prepare something."""

    examples: tuple[int, ...]
    boundaries: tuple[int, ...]
    evaluation: bool = False
    filler: int = 0

    @property
    def num_tokens(self) -> int:
        """With the filler."""
        return self.num_example_tokens + self.filler

    @property
    def num_example_tokens(self) -> int:
        return self.boundaries[-1]

    def examples_in(self, start: int, end: int) -> int:
        """Tokens of [start, end) that are examples'."""
        return min(end, self.num_example_tokens) - min(start, self.num_example_tokens)

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(example start, a, b) of each piece of [start, end) that lies in one example, or in the filler."""
        for begin, stop in pairwise((*self.boundaries, self.num_tokens)):
            a, b = max(begin, start), min(stop, end)
            if a < b:
                yield begin, a, b

    def num_pairs(self, start: int, end: int) -> int:
        """Pairs of a token of the window [start, end) and a token of its example before the window."""
        edges = self.boundaries
        example = bisect_right(edges, start)  # the others begin within the window
        if example == len(edges):
            return (end - start) * (start - edges[-1])
        return (min(end, edges[example]) - start) * (start - edges[example - 1])


def pack(
    indices: list[int], lengths: list[int], limit: int, grain: int = 1, evaluation: bool = False
) -> list[TrainingSequence]:
    """Packs examples, in order, into as few training sequences of at most `limit` tokens as that order allows; filled
    up to a multiple of `grain`, or to the limit."""
    packs: list[list[int]] = []
    room = 0
    for index in indices:
        if not packs or lengths[index] > room:
            packs.append([])
            room = limit
        packs[-1].append(index)
        room -= lengths[index]
    return [_sequence(examples, lengths, limit, grain, evaluation) for examples in packs]


def _sequence(
    examples: list[int], lengths: list[int], limit: int, grain: int, evaluation: bool
) -> TrainingSequence:
    boundaries = [0, *accumulate(lengths[index] for index in examples)]
    filler = filled(boundaries[-1], limit, grain) - boundaries[-1]
    return TrainingSequence(tuple(examples), tuple(boundaries), evaluation, filler)


def filled(num_tokens: int, limit: int, grain: int) -> int:
    """Tokens of a sequence with its filler."""
    return min(limit, -(-num_tokens // grain) * grain)
