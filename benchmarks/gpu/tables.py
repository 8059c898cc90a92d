"""Rows printed one by one as they are measured: a slow or broken one does not hide those before it."""

from __future__ import annotations

from typing import Any

NARROW, WIDE = 9, 26  # columns of numbers, of words


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class Table:
    """The first row says which columns there are; what is no plain value is in the file only."""

    def __init__(self) -> None:
        self._widths: dict[str, int] = {}
        self._words: set[str] = set()

    def add(self, row: dict[str, Any]) -> None:
        cells = {name: shown(value) for name, value in row.items() if not isinstance(value, dict | list)}
        if not self._widths:
            self._words = {name for name in cells if isinstance(row[name], str)}
            self._widths = {name: max(WIDE if name in self._words else NARROW, len(name)) for name in cells}
            self._print({name: name for name in cells})
        self._print(cells)

    def _print(self, cells: dict[str, str]) -> None:
        line = (
            cells.get(name, "").ljust(width) if name in self._words else cells.get(name, "").rjust(width)
            for name, width in self._widths.items()
        )
        print("  " + " ".join(line), flush=True)
