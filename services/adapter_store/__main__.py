"""`python -m services.adapter_store`: serves the store on its host and port."""

from __future__ import annotations

import uvicorn

from services.adapter_store.main import create_app
from shared.config import Settings
from shared.telemetry import configure_logs


def main() -> None:
    configure_logs()
    settings = Settings()
    uvicorn.run(
        create_app(settings),
        host=settings.store_host,
        port=settings.store_port,
        log_level="warning",
        timeout_graceful_shutdown=10,
        server_header=False,
    )


if __name__ == "__main__":
    main()
