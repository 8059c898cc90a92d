"""Draws what co-serving costs and brings: finetuning throughput over the time per output token, a curve a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLOT = Path(__file__).parent.parent / "docs" / "images" / "coserve.png"


def draw(results: dict[str, Any]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    policies = dict.fromkeys(cell["policy"] for cell in results["cells"])
    for policy, marker in zip(policies, "osv^D*P", strict=False):
        cells = [cell for cell in results["cells"] if cell["policy"] == policy]
        times = [cell["tpot_ms"]["p99"] for cell in cells]
        trained = [cell["finetuning_tokens_per_s"] for cell in cells]
        axes.plot(times, trained, marker=marker, label=policy, linewidth=1.2)
        for cell, x, y in zip(cells, times, trained, strict=True):
            axes.annotate(
                f"{cell['rate']:g}/s", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7
            )
    axes.axvline(results["slo"]["tpot_ms"], color="grey", linestyle="--", linewidth=1)
    alone = max(results["alone"]["finetuning"], results["alone"]["coserving"])
    axes.axhline(alone, color="grey", linestyle=":", linewidth=1)
    within = axes.get_yaxis_transform()
    axes.text(0.99, alone, "finetuning alone", va="bottom", ha="right", fontsize=8, transform=within)
    axes.set_xscale("log")
    axes.set_xlabel("time per output token, p99 of requests, ms (dashed: the service level)")
    axes.set_ylabel("finetuning, tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{results['model']}, {results['dtype']}, {results['threads']} threads; points: requests/s"
    )
    axes.legend(fontsize=8)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)
    return PLOT
