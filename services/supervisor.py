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
CHECK_EVERY_S = 5.0
HANG_S = 120.0  # a part that was ready and is not for so long is killed
START_S = 900.0  # until a restarted part must be ready: it may have a large model to load
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

    def kill(self) -> None: ...

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
    started_s: float = field(default_factory=time.monotonic, init=False)  # last

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        if self.process is not None:
            child.sweep(self.process)  # what a crashed program left behind
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists() and self.log_path.stat().st_size > MAX_LOG_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        self.started_s = time.monotonic()
        with self.log_path.open("ab") as log:
            self.process = child.spawn(self.argv, log=log, env=self.environment)

    def stop(self) -> None:
        if self.process is not None:
            child.stop(self.process, SIGTERM, self.stop_timeout_s)

    def kill(self) -> None:
        if self.process is not None:
            child.sweep(self.process)

    def problem(self) -> str | None:
        return self.check()

    def log_tail(self) -> str:
        return child.tail(self.log_path)


@dataclass(slots=True)
class Watched:
    """A started part and what the supervisor remembers of it."""

    part: Part
    deadline: float  # when it counts as hung; moved on by every look that finds it ready
    crashes: deque[float] = field(default_factory=deque)
    restart_at: float | None = None


class Supervisor:
    """Runs parts. Use as a context manager: leaving it stops whatever was started."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep
        self._watched: list[Watched] = []

    def start(self, parts: Sequence[Part], timeout_s: float, report: Report) -> None:
        """Starts the parts, then waits for each in order; those that take long to load do so side by side."""
        started = [Watched(part, time.monotonic() + timeout_s) for part in parts]
        for watched in started:
            self._watched.append(watched)
            watched.part.start()
        for watched in started:
            self._wait_until_ready(watched, report)

    def watch(self, is_over: Callable[[], bool]) -> None:
        """Restarts what crashes or hangs until `is_over`. Raises SupervisorError on a loop of crashes."""
        next_check = 0.0
        while not is_over():
            is_check = time.monotonic() >= next_check
            for watched in self._watched:
                self.tend(watched, time.monotonic(), is_check)
            if is_check:
                next_check = time.monotonic() + CHECK_EVERY_S
            self._sleep(0.2)

    def tend(self, watched: Watched, now: float, is_check: bool = False) -> None:
        """One look at one part: notes a crash, restarts when the backoff is over, kills what hangs."""
        part = watched.part
        if not part.is_running and watched.restart_at is None:
            watched.restart_at = now + note_crash(watched, now)
        elif not part.is_running and watched.restart_at is not None and now >= watched.restart_at:
            watched.restart_at = None
            watched.deadline = now + START_S
            part.start()
        elif part.is_running and is_check and part.problem() is None:
            watched.deadline = now + HANG_S
        elif part.is_running and now > watched.deadline:
            part.kill()

    def find(self, name: str) -> Watched:
        return next(watched for watched in self._watched if watched.part.name == name)

    def stop(self) -> None:
        """In the opposite order of starting: nobody loses a server that is still needed for a clean end."""
        while self._watched:
            self._watched.pop().part.stop()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_ready(self, watched: Watched, report: Report) -> None:
        part = watched.part
        while (problem := part.problem()) is not None:
            if not part.is_running:
                raise SupervisorError(f"{part.name} ended at its start:\n{part.log_tail()}")
            if time.monotonic() > watched.deadline:
                raise SupervisorError(f"{part.name} is not ready in time: {problem}")
            report(part.name, problem)
            self._sleep(0.1)
        watched.deadline = time.monotonic() + HANG_S
        report(part.name, None)


def note_crash(watched: Watched, now: float) -> float:
    """Seconds to wait before the restart: 1, 2, 4 ... 30."""
    crashes = watched.crashes
    crashes.append(now)
    while crashes[0] < now - CRASH_WINDOW_S:
        crashes.popleft()
    if len(crashes) >= MAX_CRASHES:
        times = f"{len(crashes)} times in {CRASH_WINDOW_S / 60:.0f} minutes"
        raise SupervisorError(f"{watched.part.name} crashed {times}:\n{watched.part.log_tail()}")
    return min(MAX_BACKOFF_S, 2.0 ** (len(crashes) - 1))


def http_problem(url: str) -> str | None:
    """None when the URL answers 200, else the server's own words where it gives any."""
    try:
        response = httpx.get(url, timeout=2.0, trust_env=False)
    except httpx.HTTPError as error:
        return f"{url} does not answer ({type(error).__name__})"
    return (
        None if response.status_code == 200 else f"{url} says {response.status_code}: {response.text[:200]}"
    )
