"""Imports run one way. Checked on the source, with no list of exceptions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVICES = ("api", "gpu_worker", "adapter_store")
WORKER = "services.gpu_worker"
ENGINE_LAYERS = ("kernels", "model", "compiler", "finetune", "engine")  # each imports only what stands before
ENGINE_LIBRARIES = {"torch", "triton", "numpy", "safetensors", "transformers"}
TENSORLESS = (  # files that decide without tensors
    "engine/scheduler.py",
    "engine/block_manager.py",
    "engine/batch.py",
    "engine/latency.py",
    "finetune/job.py",
)
SQL = {"sqlalchemy", "alembic", "psycopg", "asyncpg"}


def modules(*packages: str) -> list[Path]:
    """Source files under these packages, as paths from the root."""
    found = (path for package in packages for path in (ROOT / package.replace(".", "/")).rglob("*.py"))
    return sorted(path.relative_to(ROOT) for path in found)


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that the file imports, anywhere in it; `from a import b` gives `a.b`."""
    package = path.parent.parts
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def starts(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def offences(paths: list[Path], is_forbidden: object) -> list[str]:
    assert callable(is_forbidden)
    return [f"{path} imports {name}" for path in paths for name in imports(path) if is_forbidden(name)]


def is_third_party(name: str) -> bool:
    top = name.split(".")[0]
    return top not in sys.stdlib_module_names and top not in ("services", "shared", "migrations", "tests")


def test_shared_imports_no_service() -> None:
    assert offences(modules("shared"), lambda name: starts(name, "services", "migrations", "tests")) == []


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_no_other_service(service: str) -> None:
    own = f"services.{service}"
    paths = modules(own)
    assert offences(paths, lambda name: starts(name, "services") and not starts(name, own)) == []


def test_the_worker_knows_no_sql() -> None:
    forbidden = ("shared.db", "shared.models", "migrations", *SQL)
    assert offences(modules(WORKER), lambda name: starts(name, *forbidden)) == []


@pytest.mark.parametrize("service", ["api", "adapter_store"])
def test_only_the_worker_uses_torch(service: str) -> None:
    paths = modules(f"services.{service}", "shared")
    assert offences(paths, lambda name: starts(name, "torch", "triton", "transformers")) == []


@pytest.mark.parametrize("layer", ENGINE_LAYERS)
def test_a_layer_of_the_engine_imports_only_the_layers_below_it(layer: str) -> None:
    allowed = [f"{WORKER}.{below}" for below in ENGINE_LAYERS[: ENGINE_LAYERS.index(layer) + 1]]
    ours = offences(
        modules(f"{WORKER}.{layer}"),
        lambda name: starts(name, "services", "shared", "migrations") and not starts(name, *allowed),
    )
    assert ours == []


def test_the_engine_needs_no_library_that_a_bare_gpu_machine_lacks() -> None:
    paths = modules(*(f"{WORKER}.{layer}" for layer in ENGINE_LAYERS))
    assert offences(paths, lambda name: is_third_party(name) and not starts(name, *ENGINE_LIBRARIES)) == []


@pytest.mark.parametrize("file", TENSORLESS)
def test_decisions_are_taken_without_tensors(file: str) -> None:
    path = Path(WORKER.replace(".", "/")) / file
    assert offences([path], lambda name: starts(name, "torch", "triton", "numpy")) == []


def test_only_the_settings_read_the_environment() -> None:
    settings = Path("shared/config.py")
    readers = [
        f"{path}:{node.lineno}"
        for path in modules("shared", "services", "migrations")
        if path != settings
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    ]
    assert readers == []


def test_nothing_that_executes_data_is_imported() -> None:
    forbidden = ("pickle", "marshal", "shelve", "dill", "cloudpickle")
    paths = modules("shared", "services", "migrations")
    assert offences(paths, lambda name: starts(name, *forbidden)) == []
