"""The embedded servers: data outlives them, they do not outlive us."""

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

import psycopg
import pytest
import redis

from services import child
from services.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServerError
from services.embedded.server import lock_directory

KEEP_BOTH_RUNNING = """
import sys, time
from pathlib import Path
from services.embedded import EmbeddedPostgres, EmbeddedRedis
state = Path(sys.argv[1])
with EmbeddedPostgres(state / "postgres", durable=False) as postgres, EmbeddedRedis(state / "redis") as redis:
    print(postgres.pid, redis.pid, flush=True)
    time.sleep(120)
"""


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """Short enough for sockets, unlike pytest's own directories."""
    with tempfile.TemporaryDirectory(prefix="flexllm-test-") as path:
        yield Path(path)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def connect(postgres: EmbeddedPostgres) -> psycopg.Connection:
    return psycopg.connect(postgres.url.replace("+psycopg", ""))


def is_running(pid: int) -> bool:
    """False also for a zombie, which waits only for somebody to read its status."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.05)


def test_rows_outlive_a_restart_of_postgres(state_dir: Path) -> None:
    with EmbeddedPostgres(state_dir, durable=False) as postgres, connect(postgres) as connection:
        connection.execute("CREATE TABLE note (text text)")
        connection.execute("INSERT INTO note VALUES ('kept')")
    with EmbeddedPostgres(state_dir, durable=False) as postgres, connect(postgres) as connection:
        assert connection.execute("SELECT text FROM note").fetchall() == [("kept",)]


def test_the_role_of_the_url_is_bound_by_row_level_security(postgres: EmbeddedPostgres) -> None:
    with connect(postgres) as connection:
        row = connection.execute("SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user")
        assert row.fetchone() == (False, False)


def test_streams_outlive_a_kill_of_valkey(state_dir: Path) -> None:
    with EmbeddedRedis(state_dir) as server, redis.Redis.from_url(server.url) as client:
        client.xadd("queue", {"job_id": "ftjob-1"})
        os.kill(server.pid, signal.SIGKILL)
    with EmbeddedRedis(state_dir) as server, redis.Redis.from_url(server.url) as client:
        assert client.xlen("queue") == 1


def test_valkey_never_evicts_and_writes_an_append_only_file(redis_server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as client:
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("appendonly")["appendonly"] == "yes"


def test_valkey_also_listens_on_a_port_of_the_loopback_when_asked(state_dir: Path) -> None:
    port = free_port()
    with EmbeddedRedis(state_dir, port=port), redis.Redis(host="127.0.0.1", port=port) as client:
        assert client.ping()


def test_servers_end_when_their_parent_is_killed(state_dir: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", KEEP_BOTH_RUNNING, str(state_dir)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until_gone(pids)
    with EmbeddedPostgres(state_dir / "postgres", durable=False) as postgres, connect(postgres) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)  # and the data directory is free again


def test_a_second_server_on_the_same_data_is_refused(state_dir: Path) -> None:
    with EmbeddedRedis(state_dir), pytest.raises(EmbeddedServerError, match="in use by another FlexLLM"):
        lock_directory(state_dir, timeout_s=0.1)


def test_a_server_that_cannot_start_shows_the_end_of_its_log(state_dir: Path) -> None:
    with EmbeddedRedis(state_dir):
        pass
    for damaged in (state_dir / "appendonlydir").glob("*.manifest"):
        damaged.write_text("nonsense")
    server = EmbeddedRedis(state_dir)
    with pytest.raises(EmbeddedServerError, match=r"(?s)Valkey ended at its start:.*MANIFEST"):
        server.start()
    server.stop()
    os.close(lock_directory(state_dir, timeout_s=0.1))


def test_a_long_path_gets_its_sockets_elsewhere(state_dir: Path) -> None:
    server = EmbeddedRedis(state_dir / ("long" * 30))
    with server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert server.socket_dir != server.data_dir
    assert not server.socket_dir.exists()


def test_stopping_a_child_also_ends_what_the_child_started(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        shell = child.spawn(["/bin/sh", "-c", "sleep 120 & echo $!; wait"], log=log)
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    grandchild = int((tmp_path / "log").read_text())
    child.stop(shell, signal.SIGTERM, timeout_s=5)
    wait_until_gone([shell.pid, grandchild])
