"""Two lanes compute what one does: the same gradients, losses and tokens, whichever is first."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gpu_worker.engine.batch import Batch, JobWindow
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import JobEvent
from services.gpu_worker.engine.lanes import Lanes, Progress
from services.gpu_worker.engine.latency import StepKind
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig, Phase, Window
from services.gpu_worker.model.peft import Method
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import METHODS, make_engine, prompt_of, run
from tests.gpu_worker.training import make_dataset
from tests.gpu_worker.virtual import make_job, make_latency, make_sequence, make_world

LENGTHS = [40, 12, 33, 60, 21, 28, 8, 17]
JOB = JobConfig(n_epochs=3, batch_size=4, learning_rate=5e-3, eval_every_steps=2)
SCHEDULER = {"finetune_window": 64, "min_window": 8}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_layers=5, tied=False)


def make_lanes_engine(folder: Path, **options: Any) -> Engine:
    engine = make_engine(folder, num_threads=2, **{"scheduler": SCHEDULER, **options})
    assert engine.scheduler.lane_latency is not None
    return engine


def add_job(engine: Engine, method: Method, job_id: str = "ftjob-1", seed: int = 0) -> None:
    vocab = engine.model.config.vocab_size
    validation = make_dataset([31, 18, 44], vocab, seed=9)
    engine.add_job(job_id, JOB, method, make_dataset(LENGTHS, vocab, seed=seed), validation)
    parameters = engine.runner.trainers[job_id].parameters
    generator = torch.Generator().manual_seed(seed)
    parameters.flat.add_(torch.randn(parameters.flat.shape, generator=generator) * 0.05)
    parameters.refresh()


def curve(events: list[JobEvent], job_id: str = "ftjob-1") -> list[float]:
    assert not [event.error for event in events if event.error is not None]
    reports = [event.report for event in events if event.job_id == job_id and event.report is not None]
    return [r.valid_loss if r.train_loss is None else r.train_loss for r in reports]  # type: ignore[misc]


class Watch:
    """Notes which batches an engine runs."""

    def __init__(self, engine: Engine) -> None:
        self.batches: list[Batch] = []
        inner = engine.runner.launch
        engine.runner.launch = lambda batch: (self.batches.append(batch), inner(batch))[1]  # type: ignore[method-assign]

    def lanes_of(self, kind: StepKind) -> set[int]:
        return {step.lane for batch in self.batches for step in batch.steps if step.kind is kind}


@pytest.mark.parametrize("name", METHODS)
def test_a_job_learns_the_same_in_two_lanes(folder: Path, name: str) -> None:
    one = make_engine(folder, scheduler=SCHEDULER)
    add_job(one, METHODS[name])
    expected = curve(run(one)[1])
    two = make_lanes_engine(folder)
    add_job(two, METHODS[name])
    watch = Watch(two)
    assert curve(run(two)[1]) == pytest.approx(expected, abs=2e-4)
    masters = [engine.runner.trainers["ftjob-1"].parameters.flat for engine in (one, two)]
    torch.testing.assert_close(masters[0], masters[1], atol=2e-3, rtol=0)
    trains_layers = two.job("ftjob-1").trains_layers
    assert watch.lanes_of(StepKind.FORWARD) == {0, 1}
    assert watch.lanes_of(StepKind.BACKWARD) == ({0, 1} if trains_layers else set())


@pytest.mark.parametrize("offload", ["never", "always"])
def test_one_step_in_two_lanes_has_the_gradient_of_one(folder: Path, offload: Any) -> None:
    """Before an optimizer has made much of a last bit."""
    gradients = []
    lanes = make_lanes_engine(folder, offload_activations=offload)
    for engine in (make_engine(folder, scheduler=SCHEDULER), lanes):
        add_job(engine, METHODS["lora"])
        trainer = engine.runner.trainers["ftjob-1"]
        found: list[torch.Tensor] = []
        inner = trainer.parameters.begin_step

        def begin_step(rate: float, trainer: Any = trainer, found: Any = found, inner: Any = inner) -> Any:
            found.append(trainer.parameters.grad.clone())
            return inner(rate)

        trainer.parameters.begin_step = begin_step  # type: ignore[method-assign]
        while not found:
            engine.step()
        gradients.append(found[0])
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_requests_and_two_jobs_beside_each_other_get_what_they_get_alone(folder: Path) -> None:
    alone = make_engine(folder, scheduler=SCHEDULER)
    prompts = {f"r{i}": prompt_of(alone, 3 + 11 * i % 50, seed=i) for i in range(12)}
    expected_tokens = {}
    for name, prompt in prompts.items():
        alone.add(name, prompt, Sampling(max_tokens=12))
        expected_tokens[name] = run(alone, name)[0][name].tokens
    expected_losses = {}
    for job_id, method in (("ftjob-1", METHODS["lora"]), ("ftjob-2", METHODS["ia3"])):
        add_job(alone, method, job_id)
        expected_losses[job_id] = curve(run(alone)[1], job_id)

    engine = make_lanes_engine(folder, scheduler={**SCHEDULER, "idle_ms": 8.0})
    add_job(engine, METHODS["lora"], "ftjob-1")
    add_job(engine, METHODS["ia3"], "ftjob-2")
    watch = Watch(engine)
    for name, prompt in prompts.items():
        engine.add(name, prompt, Sampling(max_tokens=12))
    outputs, events = run(engine, *prompts)
    events += run(engine)[1]
    assert {name: output.tokens for name, output in outputs.items()} == expected_tokens
    for job_id, losses in expected_losses.items():
        assert curve(events, job_id) == pytest.approx(losses, abs=2e-4)
    assert any(batch.num_lanes == 2 and batch.steps for batch in watch.batches)


def test_a_job_that_fails_in_its_lane_harms_nobody(folder: Path) -> None:
    engine = make_lanes_engine(folder)
    add_job(engine, METHODS["lora"], "ftjob-1")
    add_job(engine, METHODS["lora"], "ftjob-2", seed=1)
    trainer, calls = engine.runner.trainers["ftjob-1"], iter(range(10**9))
    inner = trainer.backward

    def backward(window: Window) -> None:
        if next(calls) == 7:
            raise RuntimeError("out of memory")
        inner(window)

    trainer.backward = backward  # type: ignore[method-assign]
    engine.add("r", prompt_of(engine, 20), Sampling(max_tokens=20))
    outputs, events = run(engine, "r")
    events += run(engine)[1]
    assert len(outputs["r"].tokens) == 20
    assert [(e.job_id, str(e.error)) for e in events if e.error] == [("ftjob-1", "out of memory")]
    assert [e.job_id for e in events if e.finished] == ["ftjob-2"]


def test_what_one_lane_raises_ends_both_and_reaches_the_caller() -> None:
    lanes = Lanes(2)
    for failing in (0, 1):
        progress = Progress()

        def work(lane: int, failing: int = failing, progress: Progress = progress) -> None:
            if lane == failing:
                raise KeyError(f"lane {lane}")
            progress.wait_for_steps(lane, 5)

        with pytest.raises(KeyError, match=f"lane {failing}"):
            lanes.run(work, progress)
    assert torch.get_num_threads() == 2


# --- steps that there is no time for


def test_steps_behind_a_late_one_are_not_begun_but_those_before_one_that_has_begun_are() -> None:
    progress = Progress()
    assert progress.begin_step(0, is_late=True)  # else nothing would ever move
    assert progress.begin_step(2, is_late=False)
    assert progress.begin_step(1, is_late=True)
    assert not progress.begin_step(3, is_late=True)
    assert not progress.begin_step(4, is_late=False)
    assert progress.num_begun == 3


@pytest.mark.parametrize("make", [make_engine, make_lanes_engine])
def test_steps_that_take_too_long_are_given_back_and_done_later(folder: Path, make: Any) -> None:
    expected_engine = make_engine(folder, scheduler=SCHEDULER)
    add_job(expected_engine, METHODS["lora"])
    expected = curve(run(expected_engine)[1])

    engine = make(folder, scheduler={**SCHEDULER, "idle_ms": 25.0})
    add_job(engine, METHODS["lora"])
    rng = random.Random(0)
    inner = engine.runner.step

    def step(work: JobWindow) -> None:
        if rng.random() < 0.05:
            time.sleep(0.05)
        inner(work)

    engine.runner.step = step  # type: ignore[method-assign]
    given_back, give_back = [], engine.scheduler.give_back

    def watch(batch: Batch, num_steps: int) -> None:
        given_back.append(len(batch.steps) - num_steps)
        give_back(batch, num_steps)

    engine.scheduler.give_back = watch  # type: ignore[method-assign]
    assert curve(run(engine)[1]) == pytest.approx(expected, abs=2e-4)
    assert sum(given_back) > 0


def test_what_is_given_back_is_where_it_was() -> None:
    world = make_world(num_blocks=200, lane_latency=make_latency(1.2), idle_ms=400.0, min_window=8)
    job = make_job("j", [40, 30], num_layers=5, in_flight=80)
    world.scheduler.add_job(job)
    batch = world.scheduler.schedule(world.now_s)
    assert len(batch.steps) > 4 and batch.updates and job.phase is Phase.OPTIMIZER
    world.scheduler.give_back(batch, 0)
    assert not batch.steps and not batch.updates
    assert not batch.forwards and (job.phase, job.layer, job.position) == (Phase.FORWARD, 0, 0)
    assert job.served_tokens == 0
    world.scheduler.advance(batch, world.now_s)
    world.run()
    assert job.step == job.total_steps


# --- which steps may run at once


def test_neighbouring_layers_are_under_way_at_once_and_no_others() -> None:
    job = make_job("j", [40], num_layers=4)

    def step(start: int, end: int, layer: int, phase: Phase = Phase.BACKWARD) -> JobWindow:
        return JobWindow(job, job.sequence, Window(start, end, layer, phase))

    assert not step(20, 40, 2).must_follow(step(0, 20, 3))  # the rows before it, a layer above
    assert step(20, 40, 2).must_follow(step(20, 40, 3))  # its own rows
    assert step(20, 40, 2).must_follow(step(10, 30, 3))  # some of them
    assert step(0, 20, 3).must_follow(step(20, 40, 3))  # sums into keys that it reads
    assert step(20, 40, 1).must_follow(step(0, 20, 3))  # two layers have room for their sums, three do not
    forward = partial(step, phase=Phase.FORWARD)
    assert not forward(0, 20, 3).must_follow(forward(20, 40, 2))  # the rows behind it, a layer below
    assert forward(0, 20, 3).must_follow(forward(0, 20, 2))  # its own rows
    assert forward(0, 20, 3).must_follow(forward(10, 30, 2))  # some of them
    assert forward(20, 40, 3).must_follow(forward(0, 20, 3))  # writes keys that it reads
    assert step(20, 40, 3).must_follow(forward(0, 20, 3))  # the same
    loss = partial(forward, layer=4)
    assert loss(0, 20).must_follow(forward(0, 20, 3)) and not loss(0, 20).must_follow(forward(20, 40, 3))
    assert not loss(20, 40).must_follow(loss(0, 20)) and not step(20, 40, 3).must_follow(loss(0, 20))
    assert step(0, 20, 3).must_follow(loss(0, 20))
    job.trains_head = True
    assert loss(20, 40).must_follow(loss(0, 20))  # they sum into the same gradients
    other = make_job("k", [40], num_layers=4)
    assert not JobWindow(other, other.sequence, Window(0, 20, 3, Phase.BACKWARD)).must_follow(step(0, 20, 3))


def replay(batch: Batch, scheduler: Any) -> tuple[list[float], list[tuple[JobWindow, float, float]]]:
    """Runs a batch's lanes by a clock as `ModelRunner` does, each waiting for what it is told to wait for: when the
    lanes end, and from when to when each step ran."""
    latency = scheduler.lane_latency
    clocks = [latency.forward_ms(batch.forward_work), 0.0]
    ends: list[list[float]] = [[], []]
    spans: list[tuple[JobWindow, float, float]] = []
    todo = [list(batch.steps_of(lane)) for lane in range(2)]
    while any(todo):
        before = sum(map(len, todo))
        for lane in range(2):
            if todo[lane] and todo[lane][0][2] <= len(ends[1 - lane]):
                _, step, needed = todo[lane].pop(0)
                start = max(clocks[lane], ends[1 - lane][needed - 1] if needed else 0.0)
                clocks[lane] = start + latency.step_ms(step.work)
                ends[lane].append(clocks[lane])
                spans.append((step, start, clocks[lane]))
        assert sum(map(len, todo)) < before, "the lanes wait for each other"
    return clocks, spans


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_jobs=st.integers(1, 3))
def test_lanes_end_when_predicted_and_no_step_runs_beside_one_that_it_must_follow(
    seed: int, num_jobs: int
) -> None:
    rng = random.Random(seed)
    world = make_world(
        num_blocks=400,
        lane_latency=make_latency(1.6),
        idle_ms=rng.choice([15.0, 60.0, 400.0]),
        min_window=rng.choice([4, 8]),
        finetune_window=rng.choice([16, 64]),
    )
    for i in range(num_jobs):
        lengths = [rng.randint(2, 60) for _ in range(6)]
        world.scheduler.add_job(
            make_job(f"j{i}", lengths, batch_size=rng.randint(1, 4), num_layers=rng.randint(2, 6))
        )
    for iteration in range(80):
        if rng.random() < 0.1:
            world.scheduler.add(
                make_sequence(
                    f"r{iteration}", rng.randint(1, 40), rng.randint(1, 20), iteration, tpot_slo_ms=60
                )
            )
        batch = world.step()
        if batch.num_lanes == 1:
            continue
        clocks, spans = replay(batch, world.scheduler)
        updates_ms = sum(update.share for update in batch.updates) * world.scheduler.latency.optimizer_ms
        assert max(clocks) + updates_ms == pytest.approx(batch.predicted_ms)
        for i, (step, start, _) in enumerate(spans):
            for earlier, _, end in spans[:i]:
                if batch.steps.index(earlier) < batch.steps.index(step) and step.must_follow(earlier):
                    assert end <= start + 1e-9


def test_requests_take_one_lane_and_the_other_trains_meanwhile() -> None:
    world = make_world(num_blocks=400, lane_latency=make_latency(1.2), finetune_window=64)
    world.scheduler.add_job(make_job("j", [60] * 40, num_layers=60))
    for i in range(4):
        world.scheduler.add(make_sequence(f"r{i}", 8, 40, i, tpot_slo_ms=50))
    batches = [world.step() for _ in range(30)]
    decoding = [batch for batch in batches if batch.decodes and batch.num_lanes == 2]
    assert len(decoding) > 20
    assert all(work.lane == 1 for batch in decoding for work in batch.steps[:1])


def test_requests_that_one_lane_would_make_late_get_all_threads() -> None:
    world = make_world(num_blocks=400, lane_latency=make_latency(8.0), finetune_window=64)
    world.scheduler.add_job(make_job("j", [60] * 40))
    for i in range(4):
        world.scheduler.add(make_sequence(f"r{i}", 8, 40, i, tpot_slo_ms=12))
    batches = [world.step() for _ in range(20)]
    assert {batch.num_lanes for batch in batches if batch.decodes} == {1}
