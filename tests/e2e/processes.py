"""The real services as child processes of a test."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM

import httpx

from services import child
from shared.config import Settings, child_environment

STORE = "services.adapter_store"
WORKER = "services.gpu_worker"


def with_short_timers(settings: Settings, **changes: object) -> Settings:
    """For a worker beside an adapter store of the test's own; the work of a killed one moves on within seconds."""
    port = free_port()
    return settings.model_copy(
        update={
            "store_port": port,
            "adapter_store_url": f"http://127.0.0.1:{port}",
            "dtype": "float32",
            "kv_cache_bytes": 8 << 20,
            "max_model_len": 512,
            "lease_s": 2.0,
            "beat_s": 0.2,
            "reap_s": 0.2,
            "worker_ttl_s": 5.0,
            "job_lease_s": 3.0,
            "job_beat_s": 0.2,
            "checkpoint_every_steps": 2,
            "finetune_tokens_in_flight": 512,
            "drain_s": 5.0,
            **changes,
        }
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """Starts services by module name; whatever is left is stopped at the end of the test."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, module: str, **changes: object) -> subprocess.Popen[bytes]:
        """With the test's settings but for `changes`."""
        environment = child_environment(self._settings.model_copy(update=changes))
        log = (self._folder / f"{module}.log").open("ab")
        argv = [sys.executable, "-m", module]
        process = child.spawn(argv, log=log, env={**environment, "OMP_NUM_THREADS": "1"})
        self._children.append(process)
        return process

    def log(self, module: str) -> str:
        return (self._folder / f"{module}.log").read_text()

    def stop(self) -> None:
        for process in self._children:
            child.stop(process, SIGTERM, 15)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
