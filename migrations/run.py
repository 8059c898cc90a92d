"""Bring a database's schema up to date."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

from shared.config import Settings


def upgrade(settings: Settings) -> None:
    """To the newest revision; does nothing when it is there. Safe to call from several processes."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["settings"] = settings
    command.upgrade(config, "head")
