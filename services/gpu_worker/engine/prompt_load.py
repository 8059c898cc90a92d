"""How much of the time requests' prompts take."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_S = 10.0  # after which a prompt counts a third of what it did


@dataclass(slots=True)
class PromptLoad:
    """The share of time that prompts have taken of late, which those to come are expected to take."""

    _sum_s: float = 0.0  # of prompts, the less the longer they are over
    _at_s: float = -math.inf

    def add(self, prompt_ms: float, now_s: float) -> None:
        self._sum_s = self._remembered_s(now_s) + prompt_ms / 1000
        self._at_s = now_s

    def share(self, now_s: float) -> float:
        """In [0, 1]."""
        return min(1.0, self._remembered_s(now_s) / MEMORY_S)

    def _remembered_s(self, now_s: float) -> float:
        return self._sum_s * math.exp((self._at_s - now_s) / MEMORY_S)
