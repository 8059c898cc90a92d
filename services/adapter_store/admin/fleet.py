"""The workers that are alive, as they reported themselves within their time to live."""

from __future__ import annotations

from dataclasses import dataclass

import redis.asyncio
import structlog

from shared.config import Settings
from shared.messages import WorkerStatus
from shared.queue import InferenceClient, QueueUnavailable

STALLED_AFTER_S = 30.0
OWNERS = {  # of a worker's memory: those that serve, then those that train
    "weights": "Weights",
    "kv_cache": "KV cache",
    "adapters": "Adapters",
    "decode_graphs": "Graphs",
    "trainable": "In training",
    "gradients": "Gradients",
    "optimizer": "Optimizer",
    "activations": "Activations",
    "accumulators": "In flight",
    "windows": "Windows",
}
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Fleet:
    """`is_known` is False while Redis cannot be reached: then nobody knows who is alive."""

    workers: tuple[WorkerStatus, ...]
    is_known: bool = True

    @property
    def owners(self) -> dict[str, str]:
        """Those of `OWNERS` that some worker may have."""
        return {
            owner: label
            for owner, label in OWNERS.items()
            if any(owner in worker.memory_bytes for worker in self.workers)
        }

    @property
    def inference_tokens_per_s(self) -> float:
        return sum(worker.inference_tokens_per_s for worker in self.workers)

    @property
    def finetune_tokens_per_s(self) -> float:
        return sum(worker.finetune_tokens_per_s for worker in self.workers)

    @property
    def running(self) -> int:
        return sum(worker.running for worker in self.workers)

    @property
    def waiting(self) -> int:
        return sum(worker.waiting for worker in self.workers)

    @property
    def total_blocks(self) -> int:
        return sum(worker.total_blocks for worker in self.workers)

    @property
    def used_blocks(self) -> int:
        return self.total_blocks - sum(worker.free_blocks for worker in self.workers)


@dataclass(frozen=True, slots=True)
class Share:
    """One owner's part of a device's memory; `start` and `width` in percent of all there is."""

    owner: str
    label: str
    num_bytes: int
    start: float
    width: float


def memory_shares(worker: WorkerStatus) -> list[Share]:
    """Side by side, in the order of `OWNERS`; nothing where the worker does not report its memory."""
    if not worker.memory_limit_bytes:
        return []
    shares, start = [], 0.0
    for owner, label in OWNERS.items():
        num_bytes = worker.memory_bytes.get(owner, 0)
        width = 100 * num_bytes / worker.memory_limit_bytes
        shares.append(Share(owner, label, num_bytes, start, width))
        start += width
    return shares


def state_of(worker: WorkerStatus) -> str:
    if worker.draining:
        return "draining"
    return "stalled" if worker.progress_age_s > STALLED_AFTER_S else "alive"


async def read_fleet(client: redis.asyncio.Redis, settings: Settings) -> Fleet:
    try:
        workers = await InferenceClient(client, settings, "admin").workers()
    except QueueUnavailable as error:
        log.warning("fleet_unknown", error=str(error))
        return Fleet((), is_known=False)
    return Fleet(tuple(sorted(workers, key=lambda worker: worker.worker_id)))
