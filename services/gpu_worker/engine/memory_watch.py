"""Looks at the free memory and has finetuning give up what the device lacks."""

from __future__ import annotations

from collections.abc import Mapping

from services.gpu_worker.engine.memory import free_bytes, total_bytes
from services.gpu_worker.engine.pressure import Pressure, PressureGauge
from services.gpu_worker.engine.scheduler import Scheduler
from services.gpu_worker.finetune.trainer import Trainer
from services.gpu_worker.model.weights import ModelWeights

INTERVAL_S = 1.0
LOW, HIGH = 0.03, 0.06  # of the device's memory


class MemoryWatch:
    """`can_move` says whether activations may go to host memory. Ranks of a group do alike."""

    def __init__(
        self, weights: ModelWeights, scheduler: Scheduler, trainers: Mapping[str, Trainer], can_move: bool
    ) -> None:
        total = weights.group.least(total_bytes(weights.device))
        self.gauge = PressureGauge(low=int(total * LOW), high=int(total * HIGH))
        self._weights = weights
        self._scheduler, self._trainers = scheduler, trainers
        self._can_move = can_move
        self._looked_s = -INTERVAL_S

    def look(self, now_s: float) -> None:
        """At most once in an interval, between two iterations."""
        if now_s - self._looked_s < INTERVAL_S:
            return
        self._looked_s = now_s
        free = self._weights.group.least(free_bytes(self._weights.device))
        pressure = self._scheduler.finetuning.pressure = self.gauge.observe(free)
        if pressure >= Pressure.ON_HOST and self._can_move:
            for trainer in self._trainers.values():
                trainer.move_to_host()
        if pressure is Pressure.PREEMPTED:
            self._scheduler.preempt_jobs()
            for trainer in self._trainers.values():
                trainer.release()
