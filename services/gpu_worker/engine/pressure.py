"""What finetuning gives up when the device runs out of memory, so that requests never have to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Pressure(IntEnum):
    """Each with all before it. Requests that need the blocks of the cache take a job's at any time, and a
    request is preempted only when no job has any."""

    NONE = 0
    SMALL_WINDOWS = 1  # what one window needs while it is computed grows with its tokens
    ON_HOST = 2  # kept activations lie in host memory
    PAUSED = 3  # no window begins, no sequence is taken in hand
    PREEMPTED = 4  # the step in hand is given up with its activations and blocks


@dataclass(slots=True)
class PressureGauge:
    """One step up for each look at a device with fewer than `low` bytes free, one down with more than `high`."""

    low: int
    high: int
    level: Pressure = Pressure.NONE

    def observe(self, free: int) -> Pressure:
        if free < self.low:
            self.level = Pressure(min(self.level + 1, Pressure.PREEMPTED))
        elif free > self.high:
            self.level = Pressure(max(self.level - 1, Pressure.NONE))
        return self.level
