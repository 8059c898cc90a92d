"""Imports run one way. Checked on the source, with no list of exceptions."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SERVICES = ("api", "gpu_worker", "adapter_store")
WORKER = "services.gpu_worker"
ENGINE_LAYERS = ("kernels", "model", "compiler", "finetune", "engine")  # each imports only what stands before
ENGINE_LIBRARIES = {"torch", "triton", "numpy", "safetensors", "transformers"}
TENSORLESS = (  # files that decide without tensors
    "engine/scheduler.py",
    "engine/scheduler_config.py",
    "engine/inference_scheduler.py",
    "engine/block_manager.py",
    "engine/job_blocks.py",
    "engine/pressure.py",
    "engine/batch.py",
    "engine/latency.py",
    "engine/correction.py",
    "engine/fit.py",
    "engine/finetune_scheduler.py",
    "engine/filling.py",
    "engine/fair_share.py",
    "engine/sharing.py",
    "engine/limits.py",
    "engine/slo.py",
    "engine/sequence.py",
    "engine/attainment.py",
    "finetune/job.py",
    "finetune/packing.py",
    "compiler/parallelize.py",
    "compiler/parallel_sites.py",
    "compiler/parallel_cost.py",
    "model/layouts.py",
    "model/peft.py",
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


def installed_by(extra: str) -> set[str]:
    """Normal names of the distributions that `flexllm-coserving[extra]` brings, those they need included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"][extra]]
    found: set[str] = set()
    for text in wanted:  # grows while it is walked
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name == project["name"]:
            wanted.extend(
                line for part in requirement.extras for line in project["optional-dependencies"][part]
            )
        elif name not in found:
            found.add(name)
            wanted.extend(requirements_of(name, requirement.extras))
    return found


def requirements_of(name: str, extras: set[str]) -> Iterator[str]:
    for text in metadata.requires(name) or ():
        marker = Requirement(text).marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield text.partition(";")[0]


def imported_by(service: str) -> set[str]:
    """Third-party packages that the service imports, by itself or through `shared`."""
    seen: set[Path] = set()
    waiting = modules(f"services.{service}")
    packages: set[str] = set()
    for path in waiting:  # grows while it is walked
        if path in seen:
            continue
        seen.add(path)
        for name in imports(path):
            if is_third_party(name):
                packages.add(name.split(".")[0])
            elif starts(name, "shared"):
                waiting.extend(files_of(name))
    return packages


def files_of(name: str) -> list[Path]:
    """The files that `import name` runs; `name` may end in something that a module defines."""
    parts = name.split(".")
    tries = [Path(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    found = [path for base in tries for path in (base.with_suffix(".py"), base / "__init__.py")]
    return [path for path in found if (ROOT / path).is_file()]


@pytest.mark.parametrize(
    ("service", "extra"), [("api", "api"), ("adapter_store", "store"), ("gpu_worker", "worker")]
)
def test_an_image_installs_what_its_service_imports(service: str, extra: str) -> None:
    owners = metadata.packages_distributions()
    installed = installed_by(extra)
    missing = [
        package
        for package in sorted(imported_by(service))
        if not installed & {canonicalize_name(owner) for owner in owners.get(package, [package])}
    ]
    assert missing == [], f"not in the extra {extra!r} of pyproject.toml"
