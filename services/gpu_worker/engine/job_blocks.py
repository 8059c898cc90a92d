"""Blocks of the key/value cache that training sequences hold, and what a job does that has to give them up."""

from __future__ import annotations

from collections.abc import Iterable

from services.gpu_worker.engine.batch import Batch, Parked
from services.gpu_worker.engine.block_manager import BlockManager
from services.gpu_worker.finetune.job import FinetuneJob


class JobBlocks:
    """A job has blocks for its longest training sequence from its step's first window to the update.

    When requests need them, the most served job of those that lose no work by it gives them: one between two
    sequences, or one that can be parked, which leaves its keys and values in host memory and pauses at the
    boundary of its window until there are blocks again. Where there is none, the most served job's step starts
    over.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._reclaimed = False  # a job lost its blocks; it waits for more than it needs

    def reserve(self, job: FinetuneJob) -> bool:
        """Blocks for the longest training sequence of the step in hand."""
        blocks = self._blocks
        wanted = blocks.blocks_for(max(sequence.num_tokens for sequence in job.sequences))
        needed = max(0, wanted - len(job.blocks))
        spare = min(blocks.num_blocks // 10, blocks.num_blocks - wanted) if self._reclaimed else 0
        if needed and not blocks.can_allocate(needed + spare):
            return False
        self._reclaimed = False
        job.blocks += blocks.allocate(needed)
        return True

    def free(self, job: FinetuneJob) -> None:
        self._blocks.free(job.blocks)
        job.blocks = []

    def reclaim(self, jobs: Iterable[FinetuneJob], batch: Batch) -> bool:
        """Takes one job's blocks; False where no job has any. The batch saves what a parked job needs of them
        before anybody writes there."""
        holders = [job for job in jobs if job.blocks]
        if not holders:
            return False
        victim = max(holders, key=lambda job: (job.can_park or not job.reads_cache, job.served_tokens))
        if victim.reads_cache and victim.can_park:
            held = victim.blocks[: self._blocks.blocks_for(victim.num_cached_tokens)]
            batch.parked.append(Parked(victim, held))
            victim.parked = True
            self.free(victim)
        else:
            self.give_up(victim)
        self._reclaimed = True
        return True

    def bring_back(self, job: FinetuneJob, batch: Batch) -> bool:
        """Blocks for a parked job, which the batch fills again; False while there are too few."""
        if not self.reserve(job):
            return False
        job.parked = False
        batch.brought_back.append(job)
        return True

    def give_up(self, job: FinetuneJob) -> None:
        """Frees what the job holds; its step starts over, unless it stands between two sequences."""
        self.free(job)
        if job.reads_cache:
            job.restart_step()
