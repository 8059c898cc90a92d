"""The state directory of a FlexLLM that runs on one machine: its lock, its secrets, its addresses."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import SecretStr

from services.errors import OperatorError
from shared.config import Settings, child_environment

SECRETS = ("internal_token", "key_pepper", "admin_password", "session_secret")
PREFIX = "FLEXLLM_"


class StateError(OperatorError):
    """The state is in use, or damaged."""


class State:
    """The files under the state directory; private to the user who runs the stack."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.models_dir = self.directory / "models"
        self.profiles_dir = self.directory / "profiles"
        self.logs_dir = self.directory / "logs"
        self.secrets_path = self.directory / "secrets.json"
        self.key_path = self.directory / "dev-key"
        self.running_path = self.directory / "running.json"

    def prepare(self) -> None:
        """Makes the directory, which others may not enter: it holds customers' data."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Only one stack at a time runs on a state. Raises StateError when one does."""
        self.prepare()
        with (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(f"FlexLLM is already running on {self.directory}") from None
            try:
                yield
            finally:
                self.running_path.unlink(missing_ok=True)

    def is_occupied(self) -> bool:
        try:
            with (self.directory / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def secrets(self) -> dict[str, SecretStr]:
        """Made at random once, and the same ever after: keys and sessions stay valid over restarts."""
        if not self.secrets_path.exists():
            made = {name: secrets.token_urlsafe(32) for name in SECRETS}
            write_private(self.secrets_path, json.dumps(made, indent=2) + "\n")
        known = json.loads(self.secrets_path.read_text())
        missing = [name for name in SECRETS if name not in known]
        if missing:
            raise StateError(f"{self.secrets_path} lacks {', '.join(missing)}")
        return {name: SecretStr(known[name]) for name in SECRETS}

    def remember(self, settings: Settings) -> None:
        """Lets other commands reach the running stack."""
        environment = child_environment(settings).items()
        plain = {name: value for name, value in environment if name.startswith(PREFIX)}
        write_private(self.running_path, json.dumps(plain, indent=2) + "\n")

    def running_settings(self) -> Settings:
        """Settings of the stack that occupies the state. Raises StateError while it is still starting."""
        try:
            plain = json.loads(self.running_path.read_text())
        except FileNotFoundError:
            raise StateError(f"FlexLLM does not run on {self.directory}, or is still starting") from None
        return Settings(**{name.removeprefix(PREFIX).lower(): text for name, text in plain.items()})


def write_private(path: Path, text: str) -> None:
    """Whole or not at all, and never readable by others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".new")
    scratch.unlink(missing_ok=True)
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
    scratch.replace(path)
