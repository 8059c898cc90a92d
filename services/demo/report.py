"""What the demo shows a person: the live line, the answers side by side, the closing table, the picture."""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.demo.record import Record
from services.demo.traffic import Traffic

WINDOW_S = 10.0  # of the live percentiles
FINAL_ANSWER = re.compile(r"#### *[-$]?[\d,.]+\s*$")


def percentiles(values: list[float]) -> str:
    if not values:
        return "   –    –"
    ordered = sorted(values)
    return (
        f"{statistics.median(ordered):4.0f} {ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]:4.0f}"
    )


def live_line(record: Record, phase: str, num_open: int) -> str:
    now = time.monotonic()
    inference, finetune = record.rates(now - 4 - 1, now)
    steps = [
        f"{name} {losses[-1][0]}/{record.total_steps[name]} loss {losses[-1][1]:.2f}"
        for name, losses in record.losses.items()
    ]
    return (
        f"{now - record.started_s:5.0f}s  {phase:<22} "
        f"serving {inference:5.0f} tok/s  finetuning {finetune:4.0f} tok/s  "
        f"TPOT p50/p99 {percentiles(record.tpots(now - WINDOW_S, now))} ms  "
        f"open {num_open:2d}  done {len(record.completed):3d}  failed {len(record.failed)}  {'  '.join(steps)}"
    )


class Display:
    """The live line: redrawn every second on a terminal, a line every few seconds in a log."""

    def __init__(self, console: Console, record: Record, traffic: Traffic) -> None:
        self._console = console
        self._record = record
        self._traffic = traffic
        self.phase = "warming up"

    async def run(self) -> None:
        if not self._console.is_terminal:
            while True:
                await asyncio.sleep(5)
                self._console.print(self._line(), soft_wrap=True)
        with Live(console=self._console, auto_refresh=False) as live:
            while True:
                live.update(Text(self._line()), refresh=True)
                await asyncio.sleep(1)

    def _line(self) -> str:
        return live_line(self._record, self.phase, self._traffic.num_open)


def side_by_side(asked: list[str], answers: dict[str, list[str]]) -> Table:
    """One column for the base model and for each adapter."""
    table = Table(title="Held-out questions, greedy, all adapters in one batch", show_lines=True)
    for name in ("question", *answers):
        table.add_column(name, ratio=1)
    for question, *row in zip(asked, *answers.values(), strict=True):
        table.add_row(question, *(Text(text[-200:]) for text in row))
    return table


def summary(
    record: Record, metrics: dict[str, Any], first_token: float, answers: dict[str, list[str]]
) -> dict[str, Any]:
    """The figures of the closing table; also written beside the picture. `metrics` are the longest job's."""
    baseline = record.tpots(*record.spans["serving alone"])
    together_span = record.training_span("serving and finetuning")
    together = record.tpots(*together_span)
    _, alone = record.rates(*record.training_span("finetuning alone"))
    serving, finetuning = record.rates(*together_span)
    return {
        "requests_served": len(record.completed),
        "requests_failed": len(record.failed),
        "tpot_ms_serving_alone_p50": statistics.median(baseline) if baseline else None,
        "tpot_ms_with_finetuning_p50": statistics.median(together) if together else None,
        "finetuning_alone_tok_s": alone,
        "finetuning_while_serving_tok_s": finetuning,
        "serving_while_finetuning_tok_s": serving,
        "finetuning_share": finetuning / alone if alone else None,
        "base_validation_loss": metrics.get("base_valid_loss"),
        "adapter_validation_loss": metrics.get("valid_loss"),
        "last_step_to_first_token_s": first_token - metrics["trained_at"],
        "train_loss": {
            name: {"steps": losses[-1][0], "first": losses[0][1], "last": losses[-1][1]}
            for name, losses in record.losses.items()
        },
        "final_answers": {
            name: sum(bool(FINAL_ANSWER.search(text)) for text in texts) for name, texts in answers.items()
        },
        "questions": len(answers["base"]),
    }


def summary_table(found: dict[str, Any], tpot_slo_ms: float) -> Table:
    def number(value: float | None, unit: str = "", digits: int = 0) -> str:
        return "–" if value is None else f"{value:.{digits}f}{unit}"

    table = Table(title="What was measured", show_header=False)
    share = found["finetuning_share"]
    together = number(found["tpot_ms_with_finetuning_p50"], " ms")
    asked = found["questions"]
    rows = {
        "requests served / failed": f"{found['requests_served']} / {found['requests_failed']}",
        "TPOT p50, serving alone": number(found["tpot_ms_serving_alone_p50"], " ms"),
        "TPOT p50, while finetuning": f"{together} (limit {tpot_slo_ms:.0f} ms)",
        "finetuning alone": number(found["finetuning_alone_tok_s"], " tok/s"),
        "finetuning while serving": number(found["finetuning_while_serving_tok_s"], " tok/s"),
        "share of finetuning alone": number(share and 100 * share, " %"),
        "validation loss, base model": number(found["base_validation_loss"], digits=3),
        "validation loss, lora": number(found["adapter_validation_loss"], digits=3),
        "last training step to first served token": number(found["last_step_to_first_token_s"], " s", 1),
    }
    for name, loss in found["train_loss"].items():
        rows[f"training loss, {name}"] = f"{loss['first']:.3f} → {loss['last']:.3f} in {loss['steps']} steps"
    for name, number_of in found["final_answers"].items():
        rows[f"'#### number' answers, {name}"] = f"{number_of} of {asked}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def save_picture(record: Record, path: Path) -> None:
    """Both throughputs over time, the phases marked, and the jobs' losses.

    Averaged over a few optimizer steps: a finetuned token counts when its backward is done, and backwards
    come in bursts.
    """
    from matplotlib.figure import Figure

    width_s = 12.0
    times = [s.at_s for s in record.samples if s.at_s - record.samples[0].at_s >= width_s]
    rates = [record.rates(t - width_s, t) for t in times]
    x = [t - record.started_s for t in times]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes, losses = figure.subplots(1, 2, width_ratios=(2.4, 1))
    axes.plot(x, [r[1] for r in rates], label="finetuning", color="#d9632a", linewidth=2)
    axes.plot(x, [r[0] for r in rates], label="serving (prompts and output)", color="#2a6bd9", linewidth=2)
    for name, (begin, end) in record.spans.items():
        axes.axvspan(begin - record.started_s, end - record.started_s, alpha=0.06, color="black")
        middle = (begin + end) / 2 - record.started_s
        axes.text(middle, 1.02, name, ha="center", transform=axes.get_xaxis_transform(), fontsize=9)
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", frameon=False)
    for name, points in record.losses.items():
        losses.plot([step for step, _ in points], [loss for _, loss in points], label=name, linewidth=1.5)
    losses.set_xlabel("optimizer step")
    losses.set_title("training loss", fontsize=10)
    losses.legend(frameon=False)
    for panel in (axes, losses):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
