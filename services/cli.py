"""The `flexllm` command: start, stop and look after FlexLLM.

Thin: what a command does stands in the modules that it calls. `keys` and `migrate` work on the database of
`FLEXLLM_DATABASE_URL` where that is set, else on the state directory's.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from migrations.run import upgrade
from services.bucket import create_bucket
from services.console import StartDisplay, key_lines, overview
from services.errors import OperatorError
from services.model_pull import DEFAULT_MODEL, pull_model
from services.plan_command import plan
from services.stack import (
    DEV_TENANT,
    Options,
    find_model,
    in_transaction,
    operator_settings,
    running_stack,
)
from services.state import State
from services.status import find_workers, is_on, progress_problem, this_host, worker_line
from services.supervisor import Supervisor
from shared.config import Settings
from shared.errors import InvalidRequestError, NotFoundError, ServiceError
from shared.keys import SCOPES, Scope, create_key, create_tenant, find_tenant, list_keys, revoke_key
from shared.model_folder import ModelFolderError, describe_model
from shared.models import ApiKey, Tenant
from shared.queue import QueueUnavailable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LLM inference and finetuning in the same iteration.",
)
keys = typer.Typer(no_args_is_help=True, help="API keys of tenants.")
models = typer.Typer(no_args_is_help=True, help="Base models on this machine.")
app.add_typer(keys, name="keys")
app.add_typer(models, name="models")
app.command()(plan)
console = Console(highlight=False)

StateDir = Annotated[Path, typer.Option("--state-dir", help="Where everything is kept.")]
Model = Annotated[
    str | None, typer.Option(help=f"Folder, .gguf file or hub id [default: {DEFAULT_MODEL.name}]")
]
ApiPort = Annotated[int, typer.Option(min=1, max=65535, help="Port of the API.")]
StorePort = Annotated[int, typer.Option(min=1, max=65535, help="Port of the adapter store and its admin UI.")]
TenantSlug = Annotated[str, typer.Option("--tenant", help="Short name, as it stands in model names.")]
STATE_DIR = Path(".flexllm")
DEFAULT_SCOPES = ("infer", "train")
Result = TypeVar("Result")


def main() -> None:
    """Entry point: what an operator can put right is one line on standard error."""
    try:
        app()
    except (OperatorError, ModelFolderError, ServiceError) as error:
        fail(str(error))
    except QueueUnavailable as error:
        fail(f"Redis does not answer: {error}")
    except OperationalError as error:
        fail(f"the database does not answer: {error.orig}")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> NoReturn:
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(1)


@app.command()
def up(
    model: Model = None,
    state_dir: StateDir = STATE_DIR,
    api_port: ApiPort = 8000,
    store_port: StorePort = 8001,
) -> None:
    """Start everything on this machine; Ctrl-C stops it. Data stays in the state directory."""
    with suppress(KeyboardInterrupt), stack(model, state_dir, api_port, store_port) as (supervisor, _, _):
        console.print("Ctrl-C stops it.")
        supervisor.watch(is_over=lambda: False)


@app.command()
def demo(
    model: Model = None,
    state_dir: StateDir = STATE_DIR,
    api_port: ApiPort = 8000,
    store_port: StorePort = 8001,
) -> None:
    """Start everything, serve and finetune at once for a few minutes, and stop."""
    with stack(model, state_dir, api_port, store_port) as (supervisor, settings, key):
        from services.demo import run_demo  # needs the extra `demo`, which a server has no use for

        run_beside(supervisor, lambda: run_demo(settings, key, console, state_dir))


@app.command()
def migrate(state_dir: StateDir = STATE_DIR) -> None:
    """Bring the database to the newest schema."""
    with operator_settings(State(state_dir)) as settings:
        upgrade(settings)
    console.print("the schema is up to date")


@app.command("create-bucket")
def make_bucket() -> None:
    """Make the bucket of FLEXLLM_OBJECT_STORE_URL on an S3 server of your own."""
    console.print(f"bucket {create_bucket(Settings())} exists")


@app.command()
def status(
    here: Annotated[bool, typer.Option("--here", help="Only workers of this machine.")] = False,
    state_dir: StateDir = STATE_DIR,
) -> None:
    """Show the GPU workers; fails when none makes progress."""
    settings = Settings()
    if "redis_url" not in settings.model_fields_set:
        settings = State(state_dir).running_settings()
    workers = [worker for worker in find_workers(settings) if not here or is_on(worker, this_host())]
    for worker in workers:
        typer.echo(worker_line(worker))
    problem = progress_problem(workers)
    if problem is not None:
        fail(problem)


@keys.command("create")
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")] = "unnamed",
    tenant: TenantSlug = DEV_TENANT,
    scope: Annotated[list[str] | None, typer.Option(help="May be repeated [default: infer, train]")] = None,
    expires_days: Annotated[
        int | None, typer.Option(min=1, help="Valid for so long; default: until revoked.")
    ] = None,
    state_dir: StateDir = STATE_DIR,
) -> None:
    """Make a key and print it, once. A tenant that does not exist yet is made."""
    scopes = checked_scopes(scope or DEFAULT_SCOPES)
    lifetime = None if expires_days is None else timedelta(days=expires_days)

    async def work(session: AsyncSession, settings: Settings) -> str:
        owner = await find_tenant(session, tenant) or await create_tenant(session, tenant, tenant)
        pepper = settings.key_pepper
        _, key = await create_key(session, owner.id, pepper, name=name, scopes=scopes, expires_after=lifetime)
        return key

    typer.echo(on_database(state_dir, work))


@keys.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    state_dir: StateDir = STATE_DIR,
) -> None:
    """Show keys; what they are is stored only as hashes."""

    async def work(session: AsyncSession, _: Settings) -> list[tuple[Tenant, ApiKey]]:
        owners = list(await session.scalars(select(Tenant).order_by(Tenant.slug)))
        chosen = [owner for owner in owners if tenant in (None, owner.slug)]
        return [(owner, key) for owner in chosen for key in await list_keys(session, owner.id)]

    for line in key_lines(on_database(state_dir, work)):
        typer.echo(line)


@keys.command()
def revoke(key_id: str, tenant: TenantSlug = DEV_TENANT, state_dir: StateDir = STATE_DIR) -> None:
    """Refuse a key from now on (within a minute everywhere)."""

    async def work(session: AsyncSession, _: Settings) -> None:
        owner = await find_tenant(session, tenant)
        if owner is None:
            raise NotFoundError(f"no tenant {tenant!r}")
        await revoke_key(session, owner.id, key_id)

    on_database(state_dir, work)
    console.print(f"revoked {key_id}")


@models.command()
def pull(
    source: Annotated[str, typer.Argument(help="Name, folder, .gguf file or hub id.")] = DEFAULT_MODEL.name,
    revision: Annotated[str | None, typer.Option(help="Of a hub's repository.")] = None,
    state_dir: StateDir = STATE_DIR,
) -> None:
    """Bring a base model into the state directory."""
    state = State(state_dir)
    state.prepare()
    folder = pull_model(source, state.models_dir, revision, report=console.print)
    console.print(f"{folder.path}\nbase digest {folder.base_digest}", soft_wrap=True)


@models.command("list")
def list_models(state_dir: StateDir = STATE_DIR) -> None:
    """Show the base models in the state directory."""
    for config in sorted(State(state_dir).models_dir.glob("*/config.json")):
        folder = describe_model(config.parent)
        console.print(
            f"{folder.path.name:<32} {folder.base_digest[:12]}  from {folder.source}", soft_wrap=True
        )


@contextmanager
def stack(
    model: str | None, state_dir: Path, api_port: int, store_port: int
) -> Iterator[tuple[Supervisor, Settings, str]]:
    """A running stack, shown while it starts and stopped however the block ends."""
    stop_on_signals()
    state = State(state_dir)
    with ExitStack() as exits:
        with StartDisplay(console) as display:
            options = Options(find_model(model, state, display.note), api_port, store_port)
            running = exits.enter_context(running_stack(state, options, display.report))
        exits.callback(console.print, "stopping")
        console.print(overview(running[1], state))
        yield running


def run_beside(supervisor: Supervisor, work: Callable[[], None]) -> None:
    """Runs `work` in a thread of its own while this one watches over the parts."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised again in the main thread
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    supervisor.watch(is_over=lambda: not thread.is_alive())
    if failure:
        raise failure[0]


def stop_on_signals() -> None:
    """SIGTERM and a closed terminal end a command as Ctrl-C does."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, interrupt)


def checked_scopes(names: Sequence[str]) -> tuple[Scope, ...]:
    unknown = sorted(set(names) - set(SCOPES))
    if unknown:
        raise InvalidRequestError(f"no scope {unknown[0]!r}: choose of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in names)


def on_database(state_dir: Path, work: Callable[[AsyncSession, Settings], Awaitable[Result]]) -> Result:
    with operator_settings(State(state_dir)) as settings:
        return in_transaction(settings, lambda session: work(session, settings))


if __name__ == "__main__":
    main()
