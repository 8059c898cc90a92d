"""How much memory is left on the device that computes."""

from __future__ import annotations

from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Of a GPU what its driver reports; of a CPU what the machine and the container's limit leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min(_machine_bytes(), _container_bytes())


def _machine_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 4 << 30  # no Linux: a guess that any machine with a model on it has
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _container_bytes() -> int:
    """What a memory limit on our control group leaves; without one, as much as there is."""
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return 1 << 62
    return max(0, int(limit.read_text()) - int(used.read_text()))
