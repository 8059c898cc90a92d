"""Blocks: nobody's are given to another, what is found by hash is what was written, nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from services.gpu_worker.engine.block_manager import BlockManager, block_hash

SIZE = 4
NUM_BLOCKS = 12


@dataclass(eq=False)
class Holder:
    seed: bytes
    tokens: list[int]
    table: list[int]
    hashes: list[bytes] = field(default_factory=list)


class BlockLife(RuleBasedStateMachine):
    """Sequences over a tiny alphabet, so that prefixes are often shared."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, SIZE)
        self.live: list[Holder] = []
        self.training: list[list[int]] = []
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # block -> seed and prefix up to its end

    @rule(
        target=holders,
        seed=st.sampled_from([b"a", b"b"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
    )
    def admit(self, seed: bytes, tokens: list[int]) -> Holder:
        matched, hashes = self.blocks.match_prefix(seed, tokens)
        assert len(matched) * SIZE < len(tokens), "the last token is always computed"
        for index, block in enumerate(matched):
            assert self.content[block] == (seed, tuple(tokens[: (index + 1) * SIZE]))
        holder = Holder(seed, tokens, matched, hashes)
        self.live.append(holder)
        self.grow(holder, len(tokens))
        return holder

    def grow(self, holder: Holder, num_tokens: int) -> None:
        """Writes as many of the tokens as there is room for."""
        needed = self.blocks.blocks_for(num_tokens) - len(holder.table)
        fresh = self.blocks.allocate(max(0, min(needed, self.blocks.num_free_blocks)))
        taken = {block for other in self.live for block in other.table}
        assert not taken & set(fresh), "a block in use was given away"
        assert not {block for blocks in self.training for block in blocks} & set(fresh)
        holder.table += fresh
        computed = holder.tokens[: min(num_tokens, len(holder.table) * SIZE)]
        for index, block in enumerate(holder.table):
            if block in fresh:
                self.content[block] = holder.seed, tuple(computed[: (index + 1) * SIZE])
        self.blocks.register(holder.seed, computed, holder.table, holder.hashes)

    @rule(holder=consumes(holders))
    def end(self, holder: Holder) -> None:
        self.blocks.free(holder.table)
        self.live.remove(holder)

    @rule(amount=st.integers(1, 4))
    def train(self, amount: int) -> None:
        if self.blocks.can_allocate(amount):
            self.training.append(self.blocks.allocate(amount))
            for block in self.training[-1]:
                self.content.pop(block, None)

    @precondition(lambda self: self.training)
    @rule()
    def stop_training(self) -> None:
        self.blocks.free(self.training.pop())

    @invariant()
    def is_whole(self) -> None:
        self.blocks.check_integrity()
        held = {b for h in self.live for b in h.table} | {b for blocks in self.training for b in blocks}
        assert self.blocks.num_free_blocks == NUM_BLOCKS - len(held)


TestBlockLife = BlockLife.TestCase
TestBlockLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_contents_of_a_freed_block_are_found_until_it_is_given_out() -> None:
    blocks = BlockManager(4, SIZE)
    table = blocks.allocate(2)
    blocks.register(b"s", list(range(8)), table, [])
    blocks.free(table)
    found, _ = blocks.match_prefix(b"s", list(range(9)))
    assert found == table
    blocks.free(found)
    blocks.allocate(4)
    assert blocks.match_prefix(b"s", list(range(9))) == ([], [])


def test_blocks_with_nothing_to_find_are_given_out_before_cached_prefixes() -> None:
    blocks = BlockManager(6, SIZE)
    prefix = blocks.allocate(2)
    blocks.register(b"s", list(range(8)), prefix, [])
    blocks.free(prefix)
    for _ in range(10):  # a training job comes and goes
        training = blocks.allocate(4)
        assert not set(training) & set(prefix)
        blocks.free(training)
    assert blocks.match_prefix(b"s", list(range(9)))[0] == prefix


def test_the_end_of_a_freed_prefix_is_forgotten_before_its_start() -> None:
    blocks = BlockManager(3, SIZE)
    table = blocks.allocate(3)
    blocks.register(b"s", list(range(12)), table, [])
    blocks.free(table)
    blocks.allocate(1)
    assert blocks.match_prefix(b"s", list(range(13)))[0] == table[:2]


def test_the_hash_depends_on_the_seed_and_on_everything_before() -> None:
    hashes = {
        block_hash(b"a", [1, 2]),
        block_hash(b"b", [1, 2]),
        block_hash(b"a", [2, 1]),
        block_hash(block_hash(b"a", [1, 2]), [1, 2]),
    }
    assert len(hashes) == 4
