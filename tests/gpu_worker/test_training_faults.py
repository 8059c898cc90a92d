"""Jobs that are interrupted, resumed, squeezed, poisoned or hostile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.gpu_worker.compiler.programs import KeptTensor
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import JobEvent
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune import optimizer
from services.gpu_worker.finetune.job import JobConfig, Phase
from services.gpu_worker.finetune.reports import TrainingDiverged
from services.gpu_worker.model.peft import LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import generate, make_engine, make_timeless_engine, prompt_of, run
from tests.gpu_worker.training import make_dataset

LORA = LoraConfig(4, 8.0, ("q_proj", "v_proj", "gate_proj", "down_proj"))
LENGTHS = [70, 12, 50, 8, 33, 64]
JOB = JobConfig(n_epochs=4, batch_size=2, learning_rate=0.01, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tied=False)


def add_job(
    engine: Engine, job_id: str = "ftjob-1", config: JobConfig = JOB, seed: int = 0, **options: Any
) -> None:
    dataset = make_dataset(LENGTHS, engine.model.config.vocab_size, seed=seed)
    engine.add_job(job_id, config, LORA, dataset, **options)


def losses(events: list[JobEvent], job_id: str = "ftjob-1") -> list[float]:
    found = [event.report for event in events if event.job_id == job_id]
    return [report.train_loss for report in found if report is not None and report.train_loss is not None]


def masters(engine: Engine, job_id: str = "ftjob-1") -> torch.Tensor:
    return engine.runner.trainers[job_id].parameters.flat


def step_until(engine: Engine, done: Callable[[], bool]) -> list[JobEvent]:
    events: list[JobEvent] = []
    for _ in range(5000):
        if done():
            return events
        events += engine.step().jobs
    raise AssertionError("it never came to that")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[dict[str, bytes], list[float]]:
    """The adapter and the losses of a job that runs alone from its first step to its last."""
    engine = make_timeless_engine(folder)
    add_job(engine)
    _, events = run(engine)
    return engine.export_job("ftjob-1", "tiny"), losses(events)


# --- interrupted and resumed


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_a_resumed_job_ends_with_the_same_bytes(
    folder: Path, undisturbed: tuple[dict[str, bytes], list[float]], stop_at: int
) -> None:
    """The same bytes because the windows are the same. In service their sizes follow the clock, so sums round
    differently; see `test_windows_of_other_sizes_change_a_run_by_rounding_only`."""
    first = make_timeless_engine(folder)
    add_job(first)
    before = losses(step_until(first, lambda: first.job("ftjob-1").step == stop_at))
    files = first.checkpoint_job("ftjob-1")
    for _ in range(3):
        first.step()  # the next step is half done when the worker dies
    second = make_timeless_engine(folder)
    add_job(second, checkpoint=files)
    assert second.job("ftjob-1").step == stop_at
    _, events = run(second)
    assert before + losses(events) == undisturbed[1]
    assert second.export_job("ftjob-1", "tiny") == undisturbed[0]


def test_a_checkpoint_holds_what_was_before_not_what_came_after(folder: Path) -> None:
    engine = make_timeless_engine(folder)
    add_job(engine)
    step_until(engine, lambda: engine.job("ftjob-1").step == 2)
    files = engine.checkpoint_job("ftjob-1")
    copies = {name: bytes(data) for name, data in files.items()}
    run(engine)
    assert files == copies
    fresh = make_timeless_engine(folder)
    add_job(fresh, checkpoint=files)
    assert fresh.checkpoint_job("ftjob-1") == files


@pytest.mark.parametrize("window", [16, 23, 64])
def test_windows_of_other_sizes_change_a_run_by_rounding_only(
    folder: Path, undisturbed: tuple[dict[str, bytes], list[float]], window: int
) -> None:
    engine = make_timeless_engine(folder, scheduler={"finetune_window": window})
    add_job(engine)
    _, events = run(engine)
    assert losses(events) == pytest.approx(undisturbed[1], abs=1e-4)


def test_a_finished_job_that_is_resumed_is_finished(folder: Path) -> None:
    engine = make_timeless_engine(folder)
    add_job(engine)
    run(engine)
    again = make_timeless_engine(folder)
    add_job(again, checkpoint=engine.checkpoint_job("ftjob-1"))
    _, events = run(again)
    assert [event.finished for event in events] == [True]
    assert again.export_job("ftjob-1", "tiny") == engine.export_job("ftjob-1", "tiny")


@pytest.mark.parametrize("offload", ["auto", "never"])
def test_a_step_that_lost_its_blocks_ends_with_the_same_result(
    folder: Path, undisturbed: tuple[dict[str, bytes], list[float]], offload: str
) -> None:
    """Its keys and values wait in host memory; without any it is computed again."""
    engine = make_timeless_engine(
        folder, num_blocks=40, scheduler={"max_model_len": 120}, offload_activations=offload
    )
    add_job(engine)
    events: list[JobEvent] = []
    number = 0
    while not any(event.finished for event in events):
        if engine.job("ftjob-1").reads_cache and not engine.scheduler.running and number < 6:
            number += 1
            engine.add(f"r{number}", prompt_of(engine, 100, seed=number), Sampling(max_tokens=4))
        events += engine.step().jobs
    assert number == 6
    assert (engine.job("ftjob-1").restarts >= 3) == (offload == "never")
    assert losses(events) == undisturbed[1]
    assert engine.export_job("ftjob-1", "tiny") == undisturbed[0]


# --- gradients that are not finite


def poison_gradient(engine: Engine, job_id: str = "ftjob-1") -> None:
    """Puts an infinity into a gradient while its step is being computed."""
    job = engine.job(job_id)
    step_until(engine, lambda: job.phase is Phase.FORWARD and job.position > 0)
    engine.runner.trainers[job_id].parameters.grad[3] = float("inf")


def test_a_gradient_that_is_not_finite_skips_its_step(folder: Path) -> None:
    engine = make_timeless_engine(folder)
    add_job(engine)
    step_until(engine, lambda: engine.job("ftjob-1").step == 2)
    before = masters(engine).clone()
    poison_gradient(engine)
    events = step_until(engine, lambda: engine.job("ftjob-1").step == 3)
    report = next(event.report for event in events if event.report is not None)
    assert report.step == 3 and report.grad_norm is None
    assert torch.equal(masters(engine), before)
    step_until(engine, lambda: engine.job("ftjob-1").step == 4)
    assert not torch.equal(masters(engine), before)
    assert torch.isfinite(masters(engine)).all()
    assert engine.runner.trainers["ftjob-1"].steps.num_skipped == 0


def test_three_such_steps_in_a_row_fail_the_job_and_nobody_else(folder: Path) -> None:
    engine = make_engine(folder)
    prompt, sampling = prompt_of(engine, 20), Sampling(max_tokens=60)
    calm = generate(engine, prompt, sampling, cache_salt="calm").tokens
    alone = make_engine(folder)
    add_job(alone, "ftjob-good", seed=1)
    expected = losses(run(alone)[1], "ftjob-good")

    add_job(engine, "ftjob-good", seed=1)
    add_job(engine, "ftjob-bad")
    bad = engine.runner.trainers["ftjob-bad"].parameters
    bad.masters[0, "v_proj.b"].fill_(float("nan"))
    bad.refresh()
    engine.add("r", prompt, sampling, cache_salt="beside")
    outputs, events = run(engine, "r")
    events += run(engine)[1]
    failures = [event for event in events if event.error is not None]
    assert [event.job_id for event in failures] == ["ftjob-bad"]
    assert isinstance(failures[0].error, TrainingDiverged)
    assert "3 steps in a row" in str(failures[0].error)
    assert outputs["r"].tokens == calm
    assert losses(events, "ftjob-good") == pytest.approx(expected, abs=1e-4)
    assert generate(engine, prompt, sampling, cache_salt="after").tokens == calm
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks


def test_a_job_whose_buffers_cannot_be_made_fails_alone(folder: Path) -> None:
    engine = make_engine(folder)
    add_job(engine, "ftjob-good", seed=1)
    add_job(engine, "ftjob-big")
    tensors = engine.runner.trainers["ftjob-big"].policies.compiled.tensors
    tensors["x"] = KeptTensor("x", 1 << 50, False)  # more than there is
    _, events = run(engine)
    assert {event.job_id: event.error is None for event in events if event.finished or event.error} == {
        "ftjob-good": True,
        "ftjob-big": False,
    }
    assert len(losses(events, "ftjob-good")) == 12
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks


def test_a_removed_job_leaves_the_other_alone(
    folder: Path, undisturbed: tuple[dict[str, bytes], list[float]]
) -> None:
    engine = make_timeless_engine(folder)
    add_job(engine, "ftjob-1")
    add_job(engine, "ftjob-2", seed=4)
    events = step_until(engine, lambda: engine.job("ftjob-2").step == 2)
    engine.remove_job("ftjob-2")
    engine.remove_job("ftjob-2")
    events += run(engine)[1]
    assert losses(events) == pytest.approx(undisturbed[1], abs=1e-4)
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks


# --- steps that come in pieces


@pytest.fixture
def piecewise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine for whose limit an optimizer step is much too long: it moves a part an iteration."""
    monkeypatch.setattr(optimizer, "PART", 700)
    engine = make_timeless_engine(folder)
    add_job(engine)
    engine.scheduler.latency.optimizer_ms = 1e6
    return engine


def test_a_step_in_pieces_comes_to_the_same_as_in_one(
    piecewise: Engine, undisturbed: tuple[dict[str, bytes], list[float]]
) -> None:
    job, seen, events = piecewise.job("ftjob-1"), set(), []
    while job.phase is not Phase.DONE:
        events += piecewise.step().jobs
        seen.add(job.updated_parts)
    assert len(seen) == job.num_update_parts > 4
    assert losses(events) == undisturbed[1]
    assert piecewise.export_job("ftjob-1", "tiny") == undisturbed[0]


def test_a_checkpoint_in_the_middle_of_a_step_is_one_of_its_end(
    folder: Path, piecewise: Engine, undisturbed: tuple[dict[str, bytes], list[float]]
) -> None:
    job = piecewise.job("ftjob-1")
    events = step_until(piecewise, lambda: job.step == 2 and job.updated_parts == 3)
    files = piecewise.checkpoint_job("ftjob-1")
    assert (job.step, job.updated_parts) == (3, 0) and losses(events) == undisturbed[1][:2]
    assert losses(piecewise.step().jobs) == undisturbed[1][2:3]
    resumed = make_timeless_engine(folder)
    add_job(resumed, checkpoint=files)
    events = step_until(resumed, lambda: resumed.job("ftjob-1").phase is Phase.DONE)
    assert losses(events) == undisturbed[1][3:]
    assert resumed.export_job("ftjob-1", "tiny") == undisturbed[0]
