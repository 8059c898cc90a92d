"""Keeps latency models on disk, one for each thing that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from services.gpu_worker.engine.fit import Extent
from services.gpu_worker.engine.latency import Curve, LatencyModel
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.model.parallel import Group
from services.gpu_worker.model.weights import ModelWeights

log = logging.getLogger(__name__)
ROOT = Path(__file__).parent.parent
CODE = ("kernels", "model", "compiler", "finetune", "engine")  # what a profile runs
CPU_INFO = Path("/proc/cpuinfo")
NAMES = [field.name for field in fields(LatencyModel) if not field.name.startswith("_")]


@dataclass(frozen=True, slots=True)
class ProfileCache:
    """The file of one `key`: everything by which times differ, as plain JSON values."""

    folder: Path
    key: Mapping[str, Any]

    @property
    def path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"latency-{digest[:20]}.json"

    def load(self, group: Group) -> LatencyModel | None:
        """Rank 0's, on every rank; None where there is none, or none that can be read."""
        numbers = _flat(model) if group.rank == 0 and (model := self._read()) else []
        count = int(group.first(len(numbers)))
        numbers = [group.first(number) for number in numbers or [0.0] * count]
        return _unflat(numbers) if numbers else None

    def save(self, model: LatencyModel, group: Group) -> None:
        """Whole or not at all. A folder that cannot be written to costs the next start its time, no more."""
        if group.rank != 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fd, name = tempfile.mkstemp(dir=self.folder, prefix=".latency-")
            try:
                with os.fdopen(fd, "w") as file:
                    json.dump({"key": self.key, "latency": _as_json(model)}, file, indent=1)
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            log.warning("the latency profile cannot be kept in %s: %s", self.folder, error)

    def _read(self) -> LatencyModel | None:
        try:
            return _from_json(json.loads(self.path.read_text())["latency"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("the latency profile %s is ignored: %s: %s", self.path, type(error).__name__, error)
            return None


def key_of(
    weights: ModelWeights, form: str, extent: Extent, block_size: int, policies: LayerPolicies
) -> dict[str, Any]:
    """Everything by which times differ; `form` is that of the layers' linears."""
    return {
        "model": asdict(weights.whole),
        "form": form,
        "dtype": str(weights.dtype),
        "kernels": weights.kernels.name,
        "device": device_name(weights.device),
        "threads": torch.get_num_threads() if weights.device.type == "cpu" else 0,
        "ranks": weights.group.size,
        "torch": torch.__version__,
        "code": code_digest(),
        "extent": asdict(extent),
        "block_size": block_size,
        "method": repr(policies.compiled.method),
        "kept": [sorted(labels) for labels in policies.reserve.layers],
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@cache
def code_digest() -> str:
    """Of the sources that a profile runs: a faster kernel must not be planned with an older one's times."""
    digest = hashlib.sha256()
    for path in sorted(path for package in CODE for path in (ROOT / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _is_curve(name: str) -> bool:
    return not name.endswith("_ms")


def _as_json(model: LatencyModel) -> dict[str, Any]:
    values = {name: getattr(model, name) for name in NAMES}
    return {
        name: {"sizes": value.sizes, "times_ms": value.times_ms} if _is_curve(name) else value
        for name, value in values.items()
    }


def _from_json(found: Mapping[str, Any]) -> LatencyModel:
    """Raises ValueError, LookupError or TypeError where it is not what `_as_json` wrote."""
    values: dict[str, Any] = {
        name: _curve(found[name]) if _is_curve(name) else _milliseconds(found[name]) for name in NAMES
    }
    return LatencyModel(**values)


def _curve(found: Mapping[str, Any]) -> Curve:
    sizes, times_ms = ([int(n) for n in found["sizes"]], [_milliseconds(t) for t in found["times_ms"]])
    if not sizes or len(sizes) != len(times_ms) or sizes != sorted(set(sizes)):
        raise ValueError(f"sizes {sizes} and times {times_ms} are no curve")
    return Curve(sizes, times_ms)


def _milliseconds(value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{value} is no time")
    return float(value)


def _flat(model: LatencyModel) -> list[float]:
    """Numbers alone, for that is what ranks can send each other: of a curve its length, its sizes and its times."""
    flat: list[float] = []
    for name in NAMES:
        value = getattr(model, name)
        flat += [len(value.sizes), *value.sizes, *value.times_ms] if _is_curve(name) else [value]
    return flat


def _unflat(numbers: Iterable[float]) -> LatencyModel:
    rest, values = iter(numbers), dict[str, Any]()
    for name in NAMES:
        values[name] = number = next(rest)
        if _is_curve(name):
            sizes, times_ms = ([next(rest) for _ in range(int(number))] for _ in range(2))
            values[name] = Curve([int(size) for size in sizes], times_ms)
    return LatencyModel(**values)
