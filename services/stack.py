"""FlexLLM on one machine with nothing installed: what `flexllm up` starts.

The same processes run in production; only the servers and the secrets come from elsewhere there.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from migrations.run import upgrade
from services.embedded import EmbeddedPostgres, EmbeddedRedis
from services.errors import OperatorError
from services.model_pull import DEFAULT_MODEL, pull_model
from services.state import State, write_private
from services.status import this_host, worker_problem
from services.supervisor import Program, Report, Supervisor, http_problem
from shared.config import Settings, child_environment
from shared.db import make_engine, session_factory
from shared.keys import SCOPES, create_key, create_tenant, find_tenant, verify_key
from shared.model_folder import check_model

DEV_TENANT = "dev"
SERVER_TIMEOUT_S = 60.0
Check = Callable[[], str | None]
Result = TypeVar("Result")
PROGRAM_TIMEOUT_S = 900.0  # the worker may have a large model to load


class StackError(OperatorError):
    """The stack cannot be started as asked."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a person chooses at the start."""

    model_dir: Path
    api_port: int = 8000
    store_port: int = 8001


def find_model(model: str | None, state: State, report: Callable[[str], None]) -> Path:
    """A folder is used where it lies; anything else is pulled into the state's models."""
    if model is not None and Path(model).is_dir():
        check_model(Path(model))
        return Path(model).resolve()
    state.prepare()
    return pull_model(model or DEFAULT_MODEL.name, state.models_dir, report=report).path


def embedded_servers(state: State) -> tuple[EmbeddedPostgres, EmbeddedRedis]:
    return EmbeddedPostgres(state.directory / "postgres"), EmbeddedRedis(state.directory / "redis")


def stack_settings(
    state: State, postgres: EmbeddedPostgres, redis: EmbeddedRedis, options: Options
) -> Settings:
    """The environment's settings, with servers and secrets of the state."""
    chosen = Settings()
    profiles = chosen.profile_dir if "profile_dir" in chosen.model_fields_set else str(state.profiles_dir)
    return Settings(
        database_url=postgres.url,
        redis_url=redis.url_of(0),
        celery_broker_url=redis.celery_url_of(1),
        object_store_url=f"file://{state.directory / 'objects'}",
        spool_dir=state.directory / "spool",
        model_dir=options.model_dir,
        profile_dir=profiles,
        api_port=options.api_port,
        store_port=options.store_port,
        adapter_store_url=f"http://127.0.0.1:{options.store_port}",
        **state.secrets(),  # type: ignore[arg-type]  # all of them SecretStr fields
    )


def programs(settings: Settings, state: State) -> list[Program]:
    """The services in the order in which they start; they stop in the opposite one."""
    environment = child_environment(settings)

    def program(name: str, *module: str, check: Check, stop_timeout_s: float, **extra: str) -> Program:
        argv, log_path = (sys.executable, "-m", *module), state.logs_dir / f"{name}.log"
        return Program(name, argv, environment | extra, log_path, check, stop_timeout_s)

    def lives(port: int) -> Check:
        return partial(http_problem, f"http://127.0.0.1:{port}/livez")

    tasks = ("celery", "--app", "services.adapter_store.celery", "worker", "--beat", "--loglevel", "info")
    schedule = ("--schedule", str(state.directory / "beat-schedule"))
    worker = program(
        "gpu-worker",
        "services.gpu_worker",
        # what one that died has reported is still there for a while, and tells nothing of this one
        check=lambda: worker_problem(settings, this_host(), started_within_s=worker.uptime_s),
        stop_timeout_s=settings.drain_s + 15,
        # the cores are shared with the other parts: threads at a barrier spin for microseconds, not for
        # milliseconds, and then sleep (sleeping at once would cost almost half of the speed)
        GOMP_SPINCOUNT="20000",
        # one for each product and number of rows: co-serving has more of them than oneDNN keeps by default
        ONEDNN_PRIMITIVE_CACHE_CAPACITY="8192",
    )
    return [
        program(
            "adapter-store", "services.adapter_store", check=lives(settings.store_port), stop_timeout_s=15
        ),
        program("tasks", *tasks, *schedule, check=lambda: None, stop_timeout_s=30),
        worker,
        program("api", "services.api", check=lives(settings.api_port), stop_timeout_s=40),
    ]


@contextmanager
def running_stack(
    state: State, options: Options, report: Report
) -> Iterator[tuple[Supervisor, Settings, str]]:
    """Everything started and ready; all stopped at the end.

    Gives the supervisor to watch with, the settings, and the API key of the tenant `dev`.
    """
    with state.occupied(), Supervisor() as supervisor:
        for port in (options.api_port, options.store_port):
            require_free_port(port)
        postgres, redis = embedded_servers(state)
        supervisor.start([postgres, redis], SERVER_TIMEOUT_S, report)
        settings = stack_settings(state, postgres, redis, options)
        upgrade(settings)
        key = ensure_dev_key(settings, state)
        supervisor.start(programs(settings, state), PROGRAM_TIMEOUT_S, report)
        state.remember(settings)
        yield supervisor, settings, key


def in_transaction(settings: Settings, work: Callable[[AsyncSession], Awaitable[Result]]) -> Result:
    """Runs `work` in one transaction on an event loop of its own."""

    async def run() -> Result:
        engine = make_engine(settings, pooled=False)
        try:
            async with session_factory(engine).begin() as session:
                return await work(session)
        finally:
            await engine.dispose()

    return asyncio.run(run())


def ensure_dev_key(settings: Settings, state: State) -> str:
    """The key in the state's file while it is valid, else a new one."""
    kept = state.key_path.read_text().strip() if state.key_path.exists() else ""
    pepper = settings.key_pepper

    async def work(session: AsyncSession) -> str:
        if await verify_key(session, pepper, kept) is not None:
            return kept
        tenant = await find_tenant(session, DEV_TENANT)
        if tenant is None:
            tenant = await create_tenant(session, "Development", DEV_TENANT)
        return (await create_key(session, tenant.id, pepper, name="development", scopes=SCOPES))[1]

    key = in_transaction(settings, work)
    if key != kept:
        write_private(state.key_path, key + "\n")
    return key


def require_free_port(port: int) -> None:
    """The services say so too, but later and in a log."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise StackError(
                f"port {port} is in use: choose another with --api-port or --store-port"
            ) from None


@contextmanager
def operator_settings(state: State) -> Iterator[Settings]:
    """Settings that reach a database: the environment's, else the running stack's, else the state's own.

    In the last case the embedded PostgreSQL is started, brought to the newest schema and stopped again.
    """
    settings = Settings()
    if "database_url" in settings.model_fields_set:
        yield settings
    elif state.is_occupied():
        yield state.running_settings()
    else:
        with state.occupied(), EmbeddedPostgres(state.directory / "postgres") as postgres:
            settings = Settings(database_url=postgres.url, **state.secrets())  # type: ignore[arg-type]
            upgrade(settings)
            yield settings
