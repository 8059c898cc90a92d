"""The app that `celery --app services.adapter_store.celery worker --beat` runs."""

from __future__ import annotations

from services.adapter_store.tasks import register
from shared.celery import make_celery
from shared.config import Settings
from shared.telemetry import configure_logs

configure_logs()
app = register(make_celery(Settings()), Settings())
