"""Blocks of the key/value cache: who holds which, and which still hold a prefix that somebody may want again.

A full block's identity is the hash of everything before and in it, starting from a seed that names the
adapter version and the tenant, so that nobody meets another's activations. Blocks of training sequences are
never registered.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """Reference-counted blocks. A free block keeps its contents, findable by hash, until it is given out again."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # in the order in which they are given out
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes blocks out of the free ones. Requires `can_allocate(num_blocks)`."""
        blocks = []
        for _ in range(num_blocks):
            block, _ = self._free.popitem(last=False)
            old = self._hash_of.pop(block, None)
            if old is not None:
                del self._by_hash[old]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Gives references back. Blocks without a prefix to find are given out first, then a prefix's end."""
        for block in reversed(list(blocks)):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def match_prefix(self, seed: bytes, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Longest run of cached full blocks of `tokens`, at least one token short of all; takes references."""
        blocks: list[int] = []
        hashes: list[bytes] = []
        parent = seed
        for end in range(self.block_size, len(tokens), self.block_size):
            parent = block_hash(parent, tokens[end - self.block_size : end])
            block = self._by_hash.get(parent)
            if block is None:
                break
            self._references[block] += 1
            self._free.pop(block, None)
            blocks.append(block)
            hashes.append(parent)
        return blocks, hashes

    def register(
        self, seed: bytes, tokens: Sequence[int], blocks: Sequence[int], hashes: list[bytes]
    ) -> None:
        """Makes the full blocks of `tokens` findable; `hashes` holds those already done and grows."""
        for index in range(len(hashes), len(tokens) // self.block_size):
            start = index * self.block_size
            parent = hashes[-1] if hashes else seed
            own = block_hash(parent, tokens[start : start + self.block_size])
            hashes.append(own)
            if own not in self._by_hash:
                self._by_hash[own] = blocks[index]
                self._hash_of[blocks[index]] = own

    def check_integrity(self) -> None:
        """Raises AssertionError where counts and maps disagree; cheap enough for tests to call after each step."""
        for block, count in enumerate(self._references):
            assert (count == 0) == (block in self._free), f"block {block}: {count} references"
        assert {self._hash_of[b]: b for b in self._hash_of} == self._by_hash


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("i", tokens).tobytes(), key=parent[:64], digest_size=32).digest()
