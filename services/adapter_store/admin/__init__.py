"""The operators' console: server-rendered pages over the registry and the jobs.

`make_admin` is the whole of it; the adapter store mounts what it returns. No build step and nothing from
other hosts: every byte that a browser loads is in `static`.
"""

from services.adapter_store.admin.main import make_admin

__all__ = ["make_admin"]
