"""Where benchmarks print: tables are as wide as they are, also where no terminal is."""

from __future__ import annotations

from rich.console import Console

console = Console(width=120)
