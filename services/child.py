"""Child processes that never outlive us.

`spawn` starts a command in a session of its own (so that a terminal's Ctrl-C reaches only us and we choose
the order of stopping) and has the kernel signal it when we die, even by SIGKILL. The wiring is done by this
very file run as a script between fork and exec: no `preexec_fn`, which is not safe beside threads.

The death signal belongs to the thread that calls `spawn`: call it from a thread that lives as long as the
child should. It is Linux's (`PR_SET_PDEATHSIG`); elsewhere a killed parent leaves its children running.
"""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 1, 8, 47, 2
CAP_DAC_OVERRIDE, CAPABILITY_VERSION_3 = 1, 0x20080522
UNPRIVILEGED_USER = "nobody"


def spawn(
    argv: Sequence[str | Path],
    *,
    log: IO[bytes] | int,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    death_signal: signal.Signals = signal.SIGTERM,
    drop_root: bool = False,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Starts `argv` with both outputs to `log`. `drop_root`: as `nobody` when we are root (see `become`)."""
    plan = {
        "argv": [str(part) for part in argv],
        "parent": os.getpid(),
        "death_signal": int(death_signal),
        "drop_root": drop_root and os.geteuid() == 0,
    }
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, json.dumps(plan)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=env,
        cwd=cwd,
        pass_fds=tuple(pass_fds),
        start_new_session=True,
    )


def stop(child: subprocess.Popen[bytes], stop_signal: signal.Signals, timeout_s: float) -> None:
    """Asks the child to end, insists after `timeout_s`, and sweeps what it left in its session."""
    if child.poll() is None:
        child.send_signal(stop_signal)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout_s)
    sweep(child)
    child.wait()


def sweep(child: subprocess.Popen[bytes]) -> None:
    """Kills everything that is left of the child's process group, the child included."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def tail(log_path: Path, num_lines: int = 15) -> str:
    """The end of a child's log, for error messages."""
    if not log_path.exists():
        return ""
    with log_path.open("rb") as log:
        log.seek(max(0, log_path.stat().st_size - 64_000))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-num_lines:])


def unprivileged_user() -> pwd.struct_passwd:
    """The user that servers which refuse to run as root are run as."""
    return pwd.getpwnam(UNPRIVILEGED_USER)


def become(user: pwd.struct_passwd) -> None:
    """Root becomes `user`, keeping one capability: to reach files that its owner alone may enter.

    A checkout under root's home (mode 0700) works so without opening that home to everybody.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int, what: str) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), what)

    check(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl keepcaps")
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    bits = 1 << CAP_DAC_OVERRIDE
    check(libc.capset(header, struct.pack("=6I", bits, bits, bits, 0, 0, 0)), "capset")
    check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0), "prctl ambient")


def run_plan(text: str) -> None:
    """Between fork and exec. Changing user clears the death signal, so that comes first."""
    plan = json.loads(text)
    if plan["drop_root"]:
        become(unprivileged_user())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, plan["death_signal"], 0, 0, 0)
    if os.getppid() != plan["parent"]:
        sys.exit("the parent ended before its child began")
    os.execvp(plan["argv"][0], plan["argv"])


if __name__ == "__main__":
    run_plan(sys.argv[1])
