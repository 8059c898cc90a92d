"""`flexllm up` as a newcomer runs it, with a tiny model: start, use, crash of a part, stop, kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_embedded import is_running, wait_until_gone

START_TIMEOUT_S = 240


class Up:
    """A running `flexllm up` with its output so far."""

    def __init__(self, state: Path, model: Path) -> None:
        self.state = state
        self.api_port, store_port = free_ports(2)
        command = [
            sys.executable,
            "-m",
            "services.cli",
            "up",
            "--state-dir",
            str(state),
            "--model",
            str(model),
        ]
        command += ["--api-port", str(self.api_port), "--store-port", str(store_port)]
        self.output = (state / "output").open("w")
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ctrl-C stops it" not in (self.state / "output").read_text():
            assert self.process.poll() is None, (self.state / "output").read_text()
            assert time.monotonic() < deadline, (self.state / "output").read_text()
            time.sleep(0.2)

    def chat(self) -> httpx.Response:
        key = (self.state / "dev-key").read_text().strip()
        body = {"model": "tiny-llama", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        url = f"http://127.0.0.1:{self.api_port}/v1/chat/completions"
        return httpx.post(url, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)

    def num_workers_begun(self) -> int:
        return (self.state / "logs" / "gpu-worker.log").read_text().count("worker_ready")

    def family(self) -> list[int]:
        """Every process below `flexllm up`."""
        parents = {int(path.name): parent_of(path) for path in Path("/proc").glob("[0-9]*")}
        found = [self.process.pid]
        for pid in found:
            found.extend(child for child, parent in parents.items() if parent == pid)
        return found[1:]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=120)
        self.output.close()


def parent_of(proc: Path) -> int:
    try:
        return int((proc / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has just ended
        return 0


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def up(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Up]:
    monkeypatch.setenv("FLEXLLM_DEVICE", "cpu")
    monkeypatch.setenv("FLEXLLM_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="flexllm-test-") as state:
        running = Up(Path(state), tiny_model_dir)
        running.wait_until_ready()
        yield running
        running.stop()


def find_program(up: Up, module: str) -> int:
    """The process of one part."""
    lines = {
        pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in up.family() if is_running(pid)
    }
    return next(pid for pid, words in lines.items() if module in words)


def test_a_stack_survives_a_crash_and_a_kill_and_stops_without_a_rest(up: Up, tiny_model_dir: Path) -> None:
    """In one test, because a start takes longest."""
    assert up.chat().json()["usage"]["completion_tokens"] == 4
    worker = find_program(up, "services.gpu_worker")
    os.kill(worker, signal.SIGKILL)
    answer = up.chat()  # waits in the queue until the worker is back
    assert answer.status_code == 200, answer.text
    assert find_program(up, "services.gpu_worker") != worker

    assert up.num_workers_begun() == 2

    key = (up.state / "dev-key").read_text()
    family = up.family()
    assert len(family) > 6
    up.process.kill()
    up.process.wait()
    wait_until_gone(family)

    again = Up(up.state, tiny_model_dir)
    try:
        again.wait_until_ready()
        assert (
            again.num_workers_begun() == 3
        )  # the report of the one that was killed has not been taken for its own
        assert (up.state / "dev-key").read_text() == key
        answer = again.chat()
        assert answer.status_code == 200, answer.text
        family = again.family()
        again.process.terminate()
        assert again.process.wait(timeout=120) == 0
        wait_until_gone(family)
    finally:
        again.stop()
