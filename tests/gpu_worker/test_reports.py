"""Optimizer steps that are read after later ones have been launched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from services.gpu_worker.finetune.loss import LossSum, WindowLoss
from services.gpu_worker.finetune.optimizer import GradientNorm
from services.gpu_worker.finetune.reports import LaunchedSteps, StepReport, TrainingDiverged
from services.gpu_worker.kernels.transfer import Readback

NAN = float("nan")


def launch(steps: LaunchedSteps, norms: list[float]) -> list[Callable[[], StepReport]]:
    found = WindowLoss(torch.tensor(6.0), torch.tensor(2), 4)
    return [
        steps.add(
            StepReport(number, 1e-3, num_tokens=9),
            GradientNorm(Readback(torch.tensor(norm))),
            LossSum({(number, 0): found}).means(),
        )
        for number, norm in enumerate(norms, 1)
    ]


def test_a_report_has_what_the_device_told_and_leaves_later_steps_to_come() -> None:
    steps = LaunchedSteps()
    first, _ = launch(steps, [0.5, NAN])
    assert first() == StepReport(1, 1e-3, 0.5, 1.5, 0.5, num_tokens=9)
    assert len(steps._unread) == 1
    assert steps.num_skipped == 1 and not steps._unread


def test_a_step_whose_gradient_was_not_finite_has_no_norm() -> None:
    (read,) = launch(LaunchedSteps(), [float("inf")])
    assert read().grad_norm is None


@pytest.mark.parametrize("asked", [False, True])
def test_the_third_skipped_step_in_a_row_is_the_one_that_fails(asked: bool) -> None:
    steps = LaunchedSteps()
    reads = launch(steps, [NAN, NAN, 0.5, NAN, NAN, NAN, 0.5])
    if asked:
        assert steps.num_skipped == 0
    failed = []
    for number, read in enumerate(reads, 1):
        try:
            read()
        except TrainingDiverged as error:
            failed.append((number, str(error)))
    assert failed == [(6, "the gradient was not finite in 3 steps in a row, up to step 6")]
