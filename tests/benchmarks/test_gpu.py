"""The benchmark for GPUs runs from end to end on a CPU, with no more than a bare machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import SECTIONS
from benchmarks.gpu.checks import Check, Numbers
from benchmarks.gpu.kernels import relative_error, result_of, results_of
from benchmarks.gpu.scales import FULL, QUICK, TINY, Scale
from benchmarks.gpu.sharing import requests, seconds_of

ROOT = Path(__file__).parents[2]
ABSENT = (
    "pydantic",
    "pydantic_settings",
    "redis",
    "rich",
    "typer",
    "peft",
    "httpx",
    "structlog",
    "orjson",
    "pytest",
)
BARE = """
import runpy, sys
for name in {absent}:
    sys.modules[name] = None  # an import of it fails
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""
MOST = {"float32": 1e-6, "bfloat16": 1e-2}
FIGURES = {  # that have to be positive in every row
    "kernels": ("limit",),
    "ceilings": ("GB/s", "TFLOP/s"),
    "start": ("seconds", "cached tokens"),
    "decode": ("batch", "TPOT p50 ms", "floor ms", "x floor", "tokens/s"),
    "prefill": ("tokens/s", "of ceiling"),
    "finetuning": ("tokens/s", "of ceiling", "of ceiling with it"),
    "coserving": ("requests", "TPOT p50", "p99", "served tok/s"),
    "temporal": ("requests", "TPOT p50", "trained tok/s", "kept"),
    "memory": ("kept KiB/token", "of plan", "held GiB", "allocated", "peak GiB", "planned", "tokens/s"),
    "losses": ("first", "last", "its last"),
    "profile": ("device ms", "share", "launches"),
}


def run(
    path: Path, *options: str, absent: tuple[str, ...] = ABSENT, **environment: str
) -> tuple[int, dict[str, Any], str]:
    """Exit code, the file, and what was printed."""
    command = [
        sys.executable,
        "-c",
        BARE.format(absent=absent),
        "--device",
        "cpu",
        "--tiny",
        "--output",
        str(path),
        *options,
    ]
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert path.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    return done.returncode, json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    return run(tmp_path_factory.mktemp("gpu") / "found.json")


def test_it_runs_to_its_end_and_finds_nothing_wrong(whole: tuple[int, dict[str, Any], str]) -> None:
    code, found, printed = whole
    assert code == 0, printed[-4000:]
    assert found["device"] == "cpu"
    assert {"date", "torch", "python"} <= found["machine"].keys()


@pytest.mark.parametrize("section", FIGURES)
def test_every_section_has_figures(section: str, whole: tuple[int, dict[str, Any], str]) -> None:
    own = whole[1]["sections"][section]
    assert own["error"] is None
    assert own["rows"]
    for row in own["rows"]:
        assert all(row[name] > 0 for name in FIGURES[section] if row[name] is not None), row
        assert any(row[name] is not None for name in FIGURES[section])


@pytest.mark.parametrize(("scale", "most_s"), [(FULL, 480), (QUICK, 120)], ids=["full", "quick"])
def test_sections_have_time_for_themselves_that_adds_up_to_what_is_promised(
    scale: Scale, most_s: float
) -> None:
    assert scale.budgets_s.keys() == SECTIONS.keys()
    assert sum(scale.budgets_s.values()) <= most_s


@pytest.mark.parametrize("scale", [FULL, QUICK, TINY], ids=["full", "quick", "tiny"])
def test_the_trace_has_requests_for_every_rate(scale: Scale) -> None:
    for rate in (*scale.rates, *scale.period_rates):
        found, seconds = requests(scale, rate), seconds_of(scale, rate)
        assert 0.7 < len(found) / (rate * seconds) < 1.4
        assert found[-1].at_s < seconds
        assert all(one.prompt_tokens + one.output_tokens <= scale.context for one in found)


def test_what_is_kept_is_what_was_planned(whole: tuple[int, dict[str, Any], str]) -> None:
    rows = whole[1]["sections"]["memory"]["rows"]
    assert [row["ok"] for row in rows if row["who"].startswith("FlexLLM")] == [True] * 4


def test_a_section_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    """Nothing can be compared with transformers where it is not there."""
    sections = ("--only", "losses", "--only", "ceilings")
    code, found, printed = run(tmp_path / "found.json", *sections, absent=(*ABSENT, "transformers"))
    assert code == 1
    assert "import of transformers halted" in found["sections"]["losses"]["error"]
    assert len(found["sections"]["ceilings"]["rows"]) == 4
    assert "FAIL: section losses" in printed


def test_every_kernel_is_compared_with_float64(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is there on Linux only")
    code, found, _ = run(tmp_path / "found.json", "--only", "kernels", TRITON_INTERPRET="1")
    rows = found["sections"]["kernels"]["rows"]
    assert code == 0
    assert len({row["kernel"] for row in rows}) == 11
    assert all(0 <= row["triton"] < MOST[row["dtype"]] for row in rows)


def double(form: Any, draw: Numbers) -> list[torch.Tensor]:
    """Wrong in float32."""
    return [draw(4) * (2 if draw.dtype == torch.float32 else 1)]


def test_other_processes_find_the_same() -> None:
    check = Check("doubled", "4", "adamw", "adamw", double)
    tasks = [(check, dtype, torch.device("cpu"), False) for dtype in check.dtypes]
    assert list(results_of(tasks, 2)) == list(results_of(tasks, 0))


def test_a_kernel_that_cannot_run_or_is_wrong_fails_by_itself() -> None:
    for module, problem in (("adamw", "None"), ("absent", "No module named")):
        check = Check("doubled", "4", "adamw", module, double)
        row = result_of(check, torch.float32, torch.device("cpu"), runs=True)
        assert row["ok"] is False
        assert problem in str(row["problem"])
    with pytest.raises(ArithmeticError, match="not all results are numbers"):
        relative_error([torch.tensor([float("nan")])], [torch.ones(1)])
