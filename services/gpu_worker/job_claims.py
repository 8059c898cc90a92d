"""Claims of finetuning jobs: an entry of the queue, its lease, and the data that its training needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import redis
import structlog

from services.gpu_worker.finetune.dataset import Dataset, InvalidDataset
from services.gpu_worker.job_run import failure_of
from services.gpu_worker.store_client import CorruptObject, StaleFence, StoreClient, StoreUnavailable
from shared.messages import ClaimRequest, JobLease
from shared.queue import FinetuneQueue

log = structlog.get_logger()
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job of ours with its data in memory."""

    lease: JobLease
    training: Dataset
    validation: Dataset | None
    checkpoint: dict[str, bytes] | None


class JobClaims:
    """Looks for jobs at most twice a second, and claims one at a time in the pool."""

    def __init__(
        self, jobs: FinetuneQueue, store: StoreClient, pool: ThreadPoolExecutor, claim: ClaimRequest
    ) -> None:
        self._jobs, self._store, self._pool, self._claim = jobs, store, pool, claim
        self._claiming: tuple[str, Future[ClaimedJob | None]] | None = None
        self._next_poll_s = 0.0

    @property
    def is_quiet(self) -> bool:
        return self._claiming is None

    def take(self, can_add_job: Callable[[], bool]) -> ClaimedJob | None:
        """A job whose claim has come through since the last call; else looks for one where there is room."""
        if self._claiming is not None:
            return self._finish(*self._claiming)
        now = time.monotonic()
        if now >= self._next_poll_s and can_add_job():
            self._next_poll_s = now + POLL_S
            self._begin()
        return None

    def _begin(self) -> None:
        try:
            entry = self._jobs.take()
        except redis.RedisError as error:
            log.warning("finetune_take_failed", error=str(error))
            return
        if entry is not None:
            self._claiming = entry[0], self._pool.submit(self._prepare, entry[1])

    def _finish(self, entry_id: str, future: Future[ClaimedJob | None]) -> ClaimedJob | None:
        if not future.done():
            return None
        self._claiming = None
        try:
            claimed = future.result()
            self._jobs.ack(entry_id)
        except (StoreUnavailable, StaleFence, redis.RedisError) as error:
            log.warning("claim_failed", error=str(error))  # the entry comes again after its lease
            return None
        return claimed

    def _prepare(self, job_id: str) -> ClaimedJob | None:
        """In the pool: claims the job and fetches what it needs; a job whose data is damaged fails here."""
        lease = self._store.claim(job_id, self._claim)
        if lease is None:
            return None
        try:
            training = Dataset.from_bytes(self._store.read_object(lease.training.key, lease.training.sha256))
            validation = None
            if lease.validation is not None:
                data = self._store.read_object(lease.validation.key, lease.validation.sha256)
                validation = Dataset.from_bytes(data)
        except (CorruptObject, InvalidDataset) as error:
            self._store.end(job_id, failure_of(lease, "dataset_read_error", str(error)))
            return None
        return ClaimedJob(lease, training, validation, self._newest_checkpoint(lease))

    def _newest_checkpoint(self, lease: JobLease) -> dict[str, bytes] | None:
        """Of the committed checkpoints the newest that is whole."""
        for reference in lease.checkpoints:
            try:
                return self._store.read_checkpoint(reference)
            except CorruptObject as error:
                log.error("checkpoint_corrupt", job=lease.job_id, step=reference.step, error=str(error))
        return None
