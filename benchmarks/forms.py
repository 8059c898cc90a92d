"""The forms of a frozen linear, and what can be said of each without an engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from services.gpu_worker.kernels.linear import DenseLinear, FrozenLinear
from services.gpu_worker.kernels.quantised import quantise
from services.gpu_worker.model.peft import GROUPS

ROWS = (1, 8, 64, 512)


@dataclass(frozen=True, slots=True)
class Form:
    name: str
    scheme: Literal["none", "int8", "int4"]
    group_size: int = 32  # of int4

    def make(self, weight: torch.Tensor) -> FrozenLinear:
        if self.scheme == "none":
            return DenseLinear(weight)
        return quantise(weight, scheme=self.scheme, group_size=self.group_size)


DENSE = Form("dense", "none")
FORMS = (
    DENSE,
    Form("int8", "int8"),
    Form("int4/32", "int4", 32),
    Form("int4/64", "int4", 64),
)


def rounding(form: Form, dense: list[FrozenLinear], ours: list[FrozenLinear]) -> dict[str, float]:
    """Root of the mean squared error, relative to the weights': of this model and of normally distributed ones."""
    off = sum(float((a.dense() - b.dense()).float().square().sum()) for a, b in zip(ours, dense, strict=True))
    all_of = sum(float(b.dense().float().square().sum()) for b in dense)
    normal = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    error = (form.make(normal).dense() - normal).norm() / normal.norm()
    return {"of_this_model": math.sqrt(off / all_of), "of_normal_weights": float(error)}


def levels(dense: list[FrozenLinear]) -> dict[str, float]:
    """Distinct values among 32 neighbours of a row, in this model and in normal weights of the same dtype."""
    some = torch.cat([linear.dense()[:16].reshape(-1, 32) for linear in dense])
    normal = torch.randn(some.shape, generator=torch.Generator().manual_seed(0)).to(some.dtype)

    def distinct(rows: torch.Tensor) -> float:
        ordered = rows.sort(1).values
        return 1 + float((ordered[:, 1:] != ordered[:, :-1]).sum(1).double().mean())

    return {"this_model": distinct(some), "normal_weights": distinct(normal)}


def products(dense: list[FrozenLinear], rounds: int) -> list[dict[str, Any]]:
    """Microseconds of one product at the shapes of a layer, by form."""
    found = []
    for group, linear in zip(GROUPS, dense, strict=False):
        kinds = {form.name: form.make(linear.dense()) for form in FORMS}
        for rows in ROWS:
            x, dy = (
                torch.randn(rows, n).to(linear.dense().dtype)
                for n in (linear.in_features, linear.out_features)
            )
            found.append(
                {"linear": group, "out": linear.out_features, "in": linear.in_features, "rows": rows}
                | {
                    "forward_us": least(
                        {name: partial(kind.forward, x) for name, kind in kinds.items()}, rounds
                    )
                }
                | {
                    "input_gradient_us": least(
                        {name: partial(kind.input_gradient, dy) for name, kind in kinds.items()}, rounds
                    )
                }
            )
    return found


def least(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Microseconds of each call, the least of interleaved rounds."""
    found = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            started, number = time.process_time(), 0
            while time.process_time() - started < 0.01:
                call()
                number += 1
            found[name] = min(found[name], (time.process_time() - started) / number * 1e6)
    return found
