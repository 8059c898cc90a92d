"""What everybody holds of the device's memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from services.gpu_worker.engine.admission import Admission
from services.gpu_worker.engine.memory import total_bytes
from services.gpu_worker.engine.model_runner import ModelRunner
from services.gpu_worker.finetune.memory import JobMemory


@dataclass(frozen=True, slots=True)
class PoolBytes:
    """Of torch's pool on a GPU."""

    allocated: int  # by tensors, those of an iteration included, and libraries' workspaces
    reserved: int  # by the pool from the driver
    peak: int  # most that was allocated at once


@dataclass(frozen=True, slots=True)
class MemoryAccount:
    """Bytes by owner, from the tensors that are there. On a CPU host and device are the same memory."""

    device: dict[str, int]
    host: dict[str, int]  # moved out of the device's memory
    finetune_budget: int  # of the device's, for all jobs together
    limit: int  # all that the device has: the GPU's memory, or the machine's or container's
    planned: int  # of the device's: what serves, and the most that the jobs that are here may come to hold
    pool: PoolBytes | None = None  # where torch counts it

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.device.values())

    @property
    def statistics(self) -> dict[str, int]:
        """What was planned beside what there is; between iterations `held` is all that a plan counts."""
        return {"planned": self.planned, "held": self.total} | (asdict(self.pool) if self.pool else {})


def pool_bytes(device: torch.device) -> PoolBytes | None:
    if device.type != "cuda":
        return None
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return PoolBytes(allocated, reserved, torch.cuda.max_memory_allocated(device))


def restart_peak(device: torch.device) -> None:
    """Counts the pool's peak from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def account_of(runner: ModelRunner, admission: Admission) -> MemoryAccount:
    """As of now."""
    jobs = sum((trainer.memory for trainer in runner.trainers.values()), JobMemory())
    device = {
        "weights": runner.model.size_bytes,
        "kv_cache": runner.cache.size_bytes,
        "adapters": runner.adapters.size_bytes,
    }
    if runner.decode_graphs is not None:
        device["decode_graphs"] = runner.decode_graphs.size_bytes
    return MemoryAccount(
        device | jobs.on_device(),
        jobs.on_host(),
        admission.budget,
        total_bytes(runner.device),
        sum(device.values()) + admission.planned_bytes,
        pool_bytes(runner.device),
    )
