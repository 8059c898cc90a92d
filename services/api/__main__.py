"""`python -m services.api`: serves the customers' API on its host and port."""

from __future__ import annotations

from services.api.server import serve
from shared.config import Settings
from shared.telemetry import configure_logs

if __name__ == "__main__":
    configure_logs()
    serve(Settings())
