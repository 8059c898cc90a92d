"""Whose the device's memory is: what is left of it, and how it is shared out.

Weights come first. The key/value cache is a setting, or most of what a GPU has left and at most 1 GiB of a
CPU's. Room is set aside for `max_adapters` adapters and their copies. Of what remains finetuning may hold a
share, and the rest is for what an iteration needs while it is computed.
"""

from __future__ import annotations

from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # of version 2 and 1: limit, use, statistics, and in these the pages that are dropped at need
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
CACHE_SHARE = {"cuda": 0.6, "cpu": 0.5}  # of what weights leave, for the key/value cache
MOST_CPU_CACHE = 1 << 30  # others run on the machine too
FINETUNE_SHARE = {"cuda": 0.75, "cpu": 0.5}  # of what weights, cache and adapters leave


def total_bytes(device: torch.device) -> int:
    """Of a GPU all it has; of a CPU the machine's memory or the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    machine = _machine_bytes("MemTotal")
    limits = [limit for limit, _ in container_bytes()]
    return min([machine, *limits])


def free_bytes(device: torch.device) -> int:
    """Of a GPU what its driver and torch's own pool have free; of a CPU what machine and container leave."""
    if device.type == "cuda":
        pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + pooled
    left = [max(0, limit - used) for limit, used in container_bytes()]
    return min([_machine_bytes("MemAvailable"), *left])


def _machine_bytes(name: str) -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4 << 30  # no Linux: a guess that any machine with a model on it has
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def container_bytes(root: Path = CGROUP) -> list[tuple[int, int]]:
    """(limit, use) of our control group where it has a limit. Files that were read and can be dropped again, as
    a checkpoint's, are charged to the group too; here they do not count."""
    found = []
    for limit_file, used_file, statistics_file, droppable in CGROUP_FILES:
        limit, used, statistics = (root / name for name in (limit_file, used_file, statistics_file))
        if not (limit.exists() and used.exists() and limit.read_text().strip().isdigit()):
            continue
        lines = statistics.read_text().splitlines() if statistics.exists() else []
        dropped = sum(int(line.split()[1]) for line in lines if line.split()[0] == droppable)
        found.append((int(limit.read_text()), int(used.read_text()) - dropped))
    return found


def cache_bytes(device: torch.device, free: int) -> int:
    """What the key/value cache gets where nobody said."""
    share = int(free * CACHE_SHARE[device.type])
    return share if device.type == "cuda" else min(share, MOST_CPU_CACHE)


def finetune_bytes(device: torch.device, left: int) -> int:
    """What all jobs together may hold where nobody said; `left` by weights, cache and adapters."""
    return max(0, int(left * FINETUNE_SHARE[device.type]))
