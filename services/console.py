"""What a person at a terminal sees of a start."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from services.state import State
from shared.config import Settings
from shared.models import ApiKey, Tenant


class StartDisplay:
    """One line for each part that became ready; below them, where it is a terminal, what the next waits for."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = Status("starting", console=console)
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()

    def note(self, line: str) -> None:
        self._status.update(escape(line))

    def report(self, name: str, problem: str | None) -> None:
        """A `services.supervisor.Report`."""
        if problem is not None:
            self.note(f"{name}: {problem}")
            return
        seconds = time.monotonic() - self._since
        self._console.print(f"[green]✓[/] {name:<14} ready after {seconds:5.1f} s")


def overview(settings: Settings, state: State) -> Table:
    """Addresses, and where keys and passwords lie (never they themselves: terminals are recorded)."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "API": f"http://127.0.0.1:{settings.api_port}/v1",
        "model": settings.model_id,
        "API key": f"in {state.key_path}",
        "admin UI": f"http://127.0.0.1:{settings.store_port}/admin",
        "admin password": f"in {state.secrets_path}",
        "logs": f"{state.logs_dir}",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    return table


def key_lines(rows: Sequence[tuple[Tenant, ApiKey]]) -> list[str]:
    """Aligned columns, never cut: ids are copied from here."""
    header = ("id", "tenant", "name", "prefix", "scopes", "created", "state")
    cells = [header] + [
        (
            key.id,
            tenant.slug,
            key.name,
            key.prefix,
            ",".join(key.scopes),
            f"{key.created_at:%F}",
            key_state(key),
        )
        for tenant, key in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def key_state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "valid" if key.expires_at is None else f"until {key.expires_at:%Y-%m-%d %H:%M}"
