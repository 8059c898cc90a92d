"""Training equals a plain loop of transformers, peft and torch's AdamW, alone and beside everything else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import JobEvent
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.reports import StepReport
from services.gpu_worker.model.peft import LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import make_engine, prompt_of, run
from tests.gpu_worker.oracle import batch_loss, copy_from, make_peft
from tests.gpu_worker.training import make_dataset

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(4, 6.0, TARGETS)
LENGTHS = [5, 40, 12, 33, 8, 21, 60, 3, 17, 28, 9, 14, 36, 11, 25, 7, 19, 30, 4, 22]
JOB = JobConfig(
    n_epochs=20,
    batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=5e-3,
    lr_schedule="cosine",
    warmup_ratio=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    seed=7,
    max_steps=50,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_heads=8, tied=False)


def make_training(engine: Engine, seed: int = 0, lengths: list[int] = LENGTHS) -> Dataset:
    return make_dataset(lengths, engine.model.config.vocab_size, seed=seed)


def add_job(engine: Engine, job_id: str, config: JobConfig = JOB, seed: int = 0, **options: Any) -> Dataset:
    """A job whose B is not zero at the start, so that every gradient counts from the first step on."""
    dataset = make_training(engine, seed)
    engine.add_job(job_id, config, LORA, dataset, **options)
    parameters = engine.runner.trainers[job_id].parameters
    generator = torch.Generator().manual_seed(seed)
    parameters.flat.copy_(torch.randn(parameters.flat.shape, generator=generator) * 0.1)
    parameters.refresh()
    return dataset


def reports_of(events: list[JobEvent], job_id: str) -> list[StepReport]:
    assert not [event.error for event in events if event.error is not None]
    return [event.report for event in events if event.job_id == job_id and event.report is not None]


def losses(reports: list[StepReport]) -> list[float]:
    return [report.train_loss for report in reports if report.train_loss is not None]


def oracle(
    folder: Path, engine: Engine, job_id: str, dataset: Dataset, validation: Dataset | None = None
) -> Iterator[dict[str, float]]:
    """The plain loop on the same start, data order, schedule and clipping; yields what each step reports."""
    job = engine.job(job_id)
    config = job.config
    peft = make_peft(folder, torch.float32, LORA)
    copy_from(engine.runner.trainers[job_id], peft)
    trainable = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    warmup = math.ceil(config.warmup_ratio * job.total_steps)
    schedule = get_scheduler(config.lr_schedule, optimizer, warmup, job.total_steps)
    for step in range(job.total_steps):
        found = {"learning_rate": schedule.get_last_lr()[0]}
        if validation is not None:
            with torch.no_grad():
                found["valid_loss"] = float(batch_loss(peft, validation, list(range(len(validation)))))
        loss = batch_loss(peft, dataset, job.step_examples(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield found | {"train_loss": float(loss.detach()), "grad_norm": float(norm)}


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[dict[str, float]]:
    engine = make_engine(folder)
    return list(oracle(folder, engine, "ftjob-1", add_job(engine, "ftjob-1")))


def assert_same_curve(reports: list[StepReport], expected: list[dict[str, float]]) -> None:
    assert len(reports) == len(expected)
    for index, (report, step) in enumerate(zip(reports, expected, strict=True)):
        assert report.step == index + 1
        assert report.learning_rate == pytest.approx(step["learning_rate"], rel=1e-9)
        assert report.train_loss == pytest.approx(step["train_loss"], abs=1e-4)
        assert report.grad_norm == pytest.approx(step["grad_norm"], rel=1e-3)


def test_fifty_steps_equal_a_plain_loop(folder: Path, expected: list[dict[str, float]]) -> None:
    engine = make_engine(folder, finetune_tokens_in_flight=90)  # several packed sequences a step
    add_job(engine, "ftjob-1")
    reports = reports_of(run(engine)[1], "ftjob-1")
    assert_same_curve(reports, expected)
    assert losses(reports)[-1] < losses(reports)[0] - 0.3
    assert (
        max(step["grad_norm"] for step in expected)
        > JOB.max_grad_norm
        > min(s["grad_norm"] for s in expected)
    )


def test_fifty_steps_beside_requests_equal_a_plain_loop(
    folder: Path, expected: list[dict[str, float]]
) -> None:
    engine = make_engine(folder, finetune_tokens_in_flight=90)
    add_job(engine, "ftjob-1")
    events: list[JobEvent] = []
    number = shared = 0
    while not any(event.finished for event in events):
        if len(engine.scheduler.running) < 3:
            number += 1
            prompt = prompt_of(engine, 1 + number * 7 % 50, seed=number)
            engine.add(
                f"r{number}", prompt, Sampling(max_tokens=1 + number % 9, temperature=1.0, seed=number)
            )
        result = engine.step()
        shared += bool(result.stats.num_forward_tokens and result.stats.num_decode_tokens)
        events += result.jobs
    assert shared > 100
    assert_same_curve(reports_of(events, "ftjob-1"), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"lr_schedule": "linear", "warmup_ratio": 0.0, "max_grad_norm": 0.0},
        {"lr_schedule": "constant", "warmup_ratio": 0.0, "gradient_accumulation_steps": 1, "batch_size": 3},
        {"beta1": 0.5, "beta2": 0.9, "epsilon": 1e-3, "weight_decay": 0.3},
    ],
    ids=str,
)
def test_hyper_parameters_mean_what_they_mean_in_a_plain_loop(folder: Path, change: dict[str, Any]) -> None:
    engine = make_engine(folder)
    fields = {name: getattr(JOB, name) for name in JobConfig.__slots__}
    dataset = add_job(engine, "ftjob-1", JobConfig(**{**fields, "max_steps": 12, **change}))
    expected = list(oracle(folder, engine, "ftjob-1", dataset))
    assert_same_curve(reports_of(run(engine)[1], "ftjob-1"), expected)


def test_two_jobs_at_once_train_as_each_would_alone(folder: Path, expected: list[dict[str, float]]) -> None:
    config = JobConfig(n_epochs=8, batch_size=5, learning_rate=5e-3, seed=3)
    alone = make_engine(folder)
    add_job(alone, "ftjob-2", config, seed=2)
    solo = losses(reports_of(run(alone)[1], "ftjob-2"))
    engine = make_engine(folder)
    add_job(engine, "ftjob-1")
    add_job(engine, "ftjob-2", config, seed=2)
    _, events = run(engine)
    assert_same_curve(reports_of(events, "ftjob-1"), expected)
    assert losses(reports_of(events, "ftjob-2")) == pytest.approx(solo, abs=1e-4)


def test_evaluations_equal_the_oracle_and_do_not_change_the_training(folder: Path) -> None:
    config = JobConfig(
        n_epochs=3, batch_size=4, learning_rate=5e-3, lr_schedule="constant", eval_every_steps=2
    )
    engine = make_engine(folder, finetune_tokens_in_flight=90)
    validation = make_training(engine, seed=9, lengths=[31, 18, 44, 6, 52])
    dataset = add_job(engine, "ftjob-1", config, validation=validation)
    expected = list(oracle(folder, engine, "ftjob-1", dataset, validation))
    reports = reports_of(run(engine)[1], "ftjob-1")
    assert losses(reports) == pytest.approx([step["train_loss"] for step in expected], abs=1e-4)
    valid = {report.step: report.valid_loss for report in reports if report.valid_loss is not None}
    assert sorted(valid) == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    for step, loss in valid.items():
        if step < len(expected):
            assert loss == pytest.approx(expected[step]["valid_loss"], abs=1e-4)


def test_the_mean_token_accuracy_is_the_share_of_likeliest_tokens_that_are_right(folder: Path) -> None:
    engine = make_engine(folder)
    dataset = add_job(engine, "ftjob-1", JobConfig(batch_size=len(LENGTHS), max_steps=1))
    peft = make_peft(folder, torch.float32, LORA)
    copy_from(engine.runner.trainers["ftjob-1"], peft)
    right = count = 0
    with torch.no_grad():
        for index in range(len(dataset)):
            tokens, labels = (torch.from_numpy(array).long() for array in dataset.example(index))
            best = peft(input_ids=tokens[None]).logits[0].argmax(-1)
            right += int((best == labels).sum())
            count += int((labels != -100).sum())
    report = reports_of(run(engine)[1], "ftjob-1")[0]
    assert report.train_accuracy == pytest.approx(right / count)
    assert report.num_tokens == sum(LENGTHS) == engine.trained_tokens("ftjob-1")
