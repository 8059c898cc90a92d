"""Sides that take turns, so that a disturbance hits none alone; of a few rounds each side's best counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OURS = "FlexLLM"


@dataclass(frozen=True, slots=True)
class Run:
    """What a side computed, in how long; `outputs` are generated tokens where a side tells them."""

    num_tokens: int
    seconds: float
    outputs: list[list[int]] | None = None

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds


Side = Callable[[], Run]


def best(rounds: int, sides: Mapping[str, Side]) -> dict[str, Run]:
    runs = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
    return {name: max((run[name] for run in runs), key=lambda run: run.rate) for name in sides}


def compared(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Tokens per second of each side, ours in multiples of the others', shares of tokens that are ours too."""
    ours = runs[OURS]
    peers = {name: run for name, run in runs.items() if name != OURS}
    return {
        "tokens_per_s": {name: run.rate for name, run in runs.items()},
        "ratio": {name: ours.rate / run.rate for name, run in peers.items()},
        "equal_tokens": {
            name: equal_share(ours.outputs, run.outputs)
            for name, run in peers.items()
            if ours.outputs and run.outputs
        },
    }


def equal_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of positions at which both generated the same token."""
    pairs = [pair for mine, other in zip(ours, theirs, strict=True) for pair in zip(mine, other, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)
