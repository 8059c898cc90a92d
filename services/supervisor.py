"""Starts the parts of FlexLLM in order, restarts what crashes, stops them in the opposite order.

A part is an embedded server or a child process. Everything runs in the thread that calls `start` and `watch`,
the main one: children are tied to its life (`services.child`).
"""

from __future__ import annotations

import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM
from typing import Protocol

import httpx

from services import child
from services.errors import OperatorError

CRASH_WINDOW_S = 300.0
MAX_CRASHES = 5  # within the window
MAX_BACKOFF_S = 30.0
MAX_LOG_BYTES = 32 << 20  # of a program's log before it is set aside at the next start
Report = Callable[[str, str | None], None]  # a part's name, and what it waits for or None: ready


class SupervisorError(OperatorError):
    """A part did not start or crashed too often; the message holds the end of its log."""


class Part(Protocol):
    """Something that runs beside us."""

    @property
    def name(self) -> str: ...

    @property
    def is_running(self) -> bool: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def problem(self) -> str | None:
        """Why it is not ready to serve; None when it is."""

    def log_tail(self) -> str: ...


@dataclass(slots=True)
class Program:
    """A part that is a child process with a log of its own, ready when `check` says None."""

    name: str
    argv: Sequence[str]
    environment: dict[str, str] = field(repr=False)
    log_path: Path
    check: Callable[[], str | None]
    stop_timeout_s: float = 10.0
    process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        if self.process is not None:
            child.sweep(self.process)  # what a crashed program left behind
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists() and self.log_path.stat().st_size > MAX_LOG_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        with self.log_path.open("ab") as log:
            self.process = child.spawn(self.argv, log=log, env=self.environment)

    def stop(self) -> None:
        if self.process is not None:
            child.stop(self.process, SIGTERM, self.stop_timeout_s)

    def problem(self) -> str | None:
        return self.check()

    def log_tail(self) -> str:
        return child.tail(self.log_path)


class Supervisor:
    """Runs parts. Use as a context manager: leaving it stops whatever was started."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep
        self._started: list[Part] = []
        self._crashes: dict[str, deque[float]] = {}
        self._restart_at: dict[str, float] = {}

    def start(self, parts: Sequence[Part], timeout_s: float, report: Report) -> None:
        """Starts the parts, then waits for each in order; those that take long to load do so side by side."""
        for part in parts:
            self._started.append(part)
            part.start()
        for part in parts:
            self._wait_until_ready(part, timeout_s, report)

    def watch(self, is_over: Callable[[], bool]) -> None:
        """Restarts what crashes until `is_over`. Raises SupervisorError when a part crashes in a loop."""
        while not is_over():
            for part in self._started:
                self.tend(part, time.monotonic())
            self._sleep(0.2)

    def tend(self, part: Part, now: float) -> None:
        """One look at one part: note a crash, or restart it when its backoff is over."""
        if part.is_running:
            return
        if part.name not in self._restart_at:
            self._restart_at[part.name] = now + self._note_crash(part, now)
        elif now >= self._restart_at[part.name]:
            del self._restart_at[part.name]
            part.start()

    def stop(self) -> None:
        """In the opposite order of starting: nobody loses a server that is still needed for a clean end."""
        while self._started:
            self._started.pop().stop()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _note_crash(self, part: Part, now: float) -> float:
        """Seconds to wait before the restart: 1, 2, 4 ... 30."""
        crashes = self._crashes.setdefault(part.name, deque())
        crashes.append(now)
        while crashes[0] < now - CRASH_WINDOW_S:
            crashes.popleft()
        if len(crashes) >= MAX_CRASHES:
            raise SupervisorError(
                f"{part.name} crashed {len(crashes)} times in {CRASH_WINDOW_S / 60:.0f} minutes:\n{part.log_tail()}"
            )
        return min(MAX_BACKOFF_S, 2.0 ** (len(crashes) - 1))

    def _wait_until_ready(self, part: Part, timeout_s: float, report: Report) -> None:
        deadline = time.monotonic() + timeout_s
        while (problem := part.problem()) is not None:
            if not part.is_running:
                raise SupervisorError(f"{part.name} ended at its start:\n{part.log_tail()}")
            if time.monotonic() > deadline:
                raise SupervisorError(f"{part.name} is not ready after {timeout_s:.0f} s: {problem}")
            report(part.name, problem)
            self._sleep(0.1)
        report(part.name, None)


def http_problem(url: str) -> str | None:
    """None when the URL answers 200, else the server's own words where it gives any."""
    try:
        response = httpx.get(url, timeout=2.0, trust_env=False)
    except httpx.HTTPError as error:
        return f"{url} does not answer ({type(error).__name__})"
    return (
        None if response.status_code == 200 else f"{url} says {response.status_code}: {response.text[:200]}"
    )
