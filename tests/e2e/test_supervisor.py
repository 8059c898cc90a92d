"""The supervisor, with real child processes: small shell programs."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.stack import StackError, require_free_port
from services.state import State, StateError
from services.supervisor import Program, Supervisor, SupervisorError
from tests.e2e.test_embedded import wait_until_gone

FOREVER = "while true; do sleep 0.1; done"
PARENT = """
import sys, time
from pathlib import Path
from services.supervisor import Program, Supervisor
script, log = sys.argv[1:]
program = Program("part", ("/bin/sh", "-c", script), {}, Path(log), lambda: None)
with Supervisor() as supervisor:
    supervisor.start([program], 10, lambda name, problem: None)
    print(program.process.pid, flush=True)
    supervisor.watch(lambda: False)
"""


def make_program(directory: Path, script: str, name: str = "part", ready_file: str | None = None) -> Program:
    """A shell script that is ready at once, or once it has made `ready_file`."""

    def check() -> str | None:
        missing = ready_file is not None and not (directory / ready_file).exists()
        return f"no {ready_file} yet" if missing else None

    environment = {"DIR": str(directory), "PATH": "/usr/bin:/bin"}
    return Program(name, ("/bin/sh", "-c", script), environment, directory / f"{name}.log", check)


def ignore(name: str, problem: str | None) -> None:
    """A report that nobody reads."""


def wait_until_ended(program: Program) -> None:
    assert program.process is not None
    program.process.wait(timeout=30)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    with Supervisor() as running:
        yield running


def test_a_start_waits_for_each_part_and_says_what_for(tmp_path: Path, supervisor: Supervisor) -> None:
    slow = make_program(tmp_path, f"sleep 0.3; touch $DIR/up; {FOREVER}", name="slow", ready_file="up")
    quick = make_program(tmp_path, FOREVER, name="quick")
    reports: list[tuple[str, str | None]] = []
    supervisor.start([slow, quick], 30, lambda name, problem: reports.append((name, problem)))
    assert reports[0] == ("slow", "no up yet")
    assert reports[-2:] == [("slow", None), ("quick", None)]


def test_a_part_that_ends_at_its_start_shows_its_log(tmp_path: Path, supervisor: Supervisor) -> None:
    part = make_program(tmp_path, "echo no such model; exit 3", ready_file="never")
    with pytest.raises(SupervisorError, match=r"part ended at its start:\nno such model"):
        supervisor.start([part], 30, ignore)


def test_a_part_that_is_never_ready_is_given_up_with_its_reason(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    part = make_program(tmp_path, FOREVER, ready_file="never")
    with pytest.raises(SupervisorError, match="part is not ready in time: no never yet"):
        supervisor.start([part], 0.2, ignore)


def test_parts_stop_in_the_opposite_order_of_their_start(tmp_path: Path) -> None:
    def noting(name: str) -> Program:
        script = f"trap 'echo {name} >> $DIR/stops; exit 0' TERM; touch $DIR/{name}; {FOREVER}"
        return make_program(tmp_path, script, name=name, ready_file=name)

    with Supervisor() as supervisor:
        supervisor.start([noting("database"), noting("worker"), noting("api")], 30, ignore)
    assert (tmp_path / "stops").read_text().split() == ["api", "worker", "database"]


def test_a_crashed_part_starts_again_after_its_backoff(tmp_path: Path, supervisor: Supervisor) -> None:
    part = make_program(tmp_path, "echo run >> $DIR/runs; exit 1")
    supervisor.start([part], 30, ignore)
    watched = supervisor.find("part")
    wait_until_ended(part)
    first = part.process
    supervisor.tend(watched, now=100.0)  # notes the crash
    supervisor.tend(watched, now=100.9)
    assert part.process is first
    supervisor.tend(watched, now=101.0)
    assert part.process is not first
    wait_until_ended(part)
    assert (tmp_path / "runs").read_text() == "run\nrun\n"


def test_a_part_that_crashes_in_a_loop_ends_the_watch(tmp_path: Path, supervisor: Supervisor) -> None:
    part = make_program(tmp_path, "echo out of luck; exit 1")
    supervisor.start([part], 30, ignore)
    watched = supervisor.find("part")

    def crash_on() -> None:
        for crash in range(10):
            wait_until_ended(part)
            supervisor.tend(watched, now=31.0 * crash)
            supervisor.tend(watched, now=31.0 * crash + 30)

    with pytest.raises(SupervisorError, match=r"part crashed 5 times in 5 minutes:[\s\S]*out of luck"):
        crash_on()


def test_crashes_long_ago_are_forgiven(tmp_path: Path, supervisor: Supervisor) -> None:
    part = make_program(tmp_path, "exit 1")
    supervisor.start([part], 30, ignore)
    watched = supervisor.find("part")
    for crash in range(8):
        wait_until_ended(part)
        supervisor.tend(watched, now=1000.0 * crash)
        supervisor.tend(watched, now=1000.0 * crash + 31)


def test_a_part_that_hangs_is_killed_and_started_again(tmp_path: Path, supervisor: Supervisor) -> None:
    part = make_program(tmp_path, f"touch $DIR/up; {FOREVER}", ready_file="up")
    supervisor.start([part], 30, ignore)
    watched, first = supervisor.find("part"), part.process
    supervisor.tend(watched, now=1000.0, is_check=True)
    (tmp_path / "up").unlink()
    supervisor.tend(watched, now=1119.0, is_check=True)
    assert part.is_running
    supervisor.tend(watched, now=1121.0, is_check=True)
    wait_until_ended(part)
    supervisor.tend(watched, now=1121.0)
    supervisor.tend(watched, now=1122.0)
    assert part.is_running
    assert part.process is not first


def test_nothing_runs_on_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    script = f"trap 'kill $sleeper; exit' TERM; sleep 120 & sleeper=$!; echo $sleeper > child; {FOREVER}"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, f"cd {tmp_path}; {script}", str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 30
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until_gone([pid, int((tmp_path / "child").read_text())])


def test_a_port_in_use_is_named_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} is in use"):
            require_free_port(port)


def test_one_state_directory_runs_one_stack(tmp_path: Path) -> None:
    state = State(tmp_path)
    assert not state.is_occupied()
    with state.occupied():
        assert state.is_occupied()
        with pytest.raises(StateError, match="already running"), State(tmp_path).occupied():
            pass
    assert not state.is_occupied()


def test_secrets_are_made_once_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    first = State(tmp_path).secrets()
    assert first == State(tmp_path).secrets()
    assert len({secret.get_secret_value() for secret in first.values()}) == len(first)
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600
