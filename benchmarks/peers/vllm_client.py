"""vLLM in a process and an environment of its own, which computes only while it is asked to."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.turns import Run

SCRIPT = Path(__file__).with_name("vllm_server.py")
OURS_ALONE = ("GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # settings that were made for our engine


def peers_environment(threads: int, **settings: str) -> dict[str, str]:
    """This process's without what was set for our engine, on the given number of threads."""
    own = {key: value for key, value in os.environ.items() if key not in OURS_ALONE}
    return own | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | settings


class Vllm:
    """Loads in the constructor; raises RuntimeError with the end of the log if the process ends."""

    def __init__(
        self, python: Path, folder: Path, threads: int, log: Path, adapters: Sequence[Path] = ()
    ) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment = peers_environment(
            threads,
            VLLM_CPU_KVCACHE_SPACE="1",  # GiB
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
        )
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-P", SCRIPT, folder.resolve(), *adapters],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self._read()

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *exception: object) -> None:
        """The end of its input ends the process."""
        self._process.communicate()

    def generate(
        self, prompts: list[list[int]], max_tokens: int, adapters: Sequence[int] | None = None
    ) -> Run:
        """`adapters`: for each prompt an index into the adapters that were loaded."""
        request = {"prompts": prompts, "max_tokens": max_tokens, "adapters": adapters}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        found = self._read()
        return Run(sum(map(len, found["outputs"])), found["seconds"], found["outputs"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            end = "\n".join(self._log.read_text().splitlines()[-20:])
            raise RuntimeError(f"vLLM ended with status {self._process.wait()}:\n{end}")
        reply: dict[str, Any] = json.loads(line)
        return reply
