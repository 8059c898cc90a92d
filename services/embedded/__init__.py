"""PostgreSQL and Valkey from Python wheels, run as our own child processes.

The embedded default is the real servers without an installation: same SQL, same Lua, same streams as in
production. Both listen on a unix socket in a directory that only we may enter, keep their data in `data_dir`
over restarts, and end with us (`services.child`). Each is a context manager:

    with EmbeddedPostgres(state / "postgres") as postgres, EmbeddedRedis(state / "redis") as redis:
        settings = Settings(database_url=postgres.url, redis_url=redis.url)
"""

from services.embedded.postgres import EmbeddedPostgres
from services.embedded.server import EmbeddedServerError
from services.embedded.valkey import EmbeddedRedis

__all__ = ["EmbeddedPostgres", "EmbeddedRedis", "EmbeddedServerError"]
