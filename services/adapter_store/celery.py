"""The app that `celery --app services.adapter_store.celery worker --beat` runs."""

from __future__ import annotations

from services.adapter_store.tasks import register
from shared.celery import make_celery
from shared.config import Settings

app = register(make_celery(Settings()), Settings())
