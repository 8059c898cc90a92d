"""Options that the benchmarks' commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SMOLLM2 = Path(".flexllm/models/SmolLM2-135M-Instruct")

Model = Annotated[Path, typer.Option(help="Model folder.")]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.")]
Dtypes = Annotated[list[str] | None, typer.Option(help="May be repeated.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
ServiceLevel = Annotated[float, typer.Option(help="Service level.")]
