"""A backward beside decodes: when it is worth it, how long both take, and that what is learnt stays the same."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.gpu_worker.engine.batch import Batch
from services.gpu_worker.engine.config import EngineConfig, may_use_side_stream
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import JobEvent
from services.gpu_worker.engine.interference import Interference, Overlap, choose
from services.gpu_worker.engine.profile import measure_interference
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.engine.side_stream import InTurn, SideStream
from services.gpu_worker.engine.startup import measured_extent
from services.gpu_worker.finetune.job import JobConfig, Window
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import METHODS, make_engine, prompt_of, run
from tests.gpu_worker.training import make_dataset
from tests.gpu_worker.virtual import World, make_job, make_latency, make_sequence, make_world

PAYS = Interference(1.2, 1.4)
IDLE_MS = 24.0  # too short for a sequence forward and back
LIMITS = {"finetune_window": 64, "min_window": 8, "idle_ms": IDLE_MS}
slowdowns = st.builds(Interference, st.floats(1.0, 5.0), st.floats(1.0, 5.0))
times_ms = st.floats(0.1, 50.0)


# --- how long both take


def simulate(beside: Interference, forward_ms: float, backward_ms: float) -> Overlap:
    """Both begin at once; when one ends the other goes on at its full speed."""
    forward_ends, backward_ends = forward_ms * beside.forward, backward_ms * beside.backward
    both_ms = min(forward_ends, backward_ends)
    return Overlap(
        both_ms + forward_ms - both_ms / beside.forward,
        both_ms + backward_ms - both_ms / beside.backward,
        both_ms,
    )


@given(beside=slowdowns, forward_ms=times_ms, backward_ms=times_ms)
def test_what_is_predicted_measured_and_learnt_is_one_model(
    beside: Interference, forward_ms: float, backward_ms: float
) -> None:
    found = simulate(beside, forward_ms, backward_ms)
    assert beside.together_ms(forward_ms, backward_ms) == pytest.approx(found.span_ms)
    assert beside.alone_ms(found) == pytest.approx((forward_ms, backward_ms))
    measured = Interference.of(Overlap(forward_ms, backward_ms), found)
    assert (measured.forward, measured.backward) == pytest.approx((beside.forward, beside.backward))


@given(beside=slowdowns, forward_ms=times_ms, limit_ms=times_ms)
def test_room_is_the_most_that_fits(beside: Interference, forward_ms: float, limit_ms: float) -> None:
    room_ms = beside.room_ms(forward_ms, limit_ms)
    if room_ms > 0:
        assert beside.together_ms(forward_ms, room_ms) == pytest.approx(limit_ms)
    else:
        assert limit_ms <= forward_ms * 1.000001


@pytest.mark.parametrize(
    ("begun_ms", "both_ms"), [(-1.0, 6.0), (0.0, 6.0), (2.0, 4.0), (5.5, 0.5), (9.0, 0.0)]
)
def test_time_that_both_ran_is_counted_once(begun_ms: float, both_ms: float) -> None:
    """A forward of 6 ms, and a backward of 10 ms that begins beside or behind it."""
    found = Overlap.begun_at(begun_ms, 6.0, 10.0)
    assert found == Overlap(6.0, 10.0, both_ms)
    assert Interference(1.5, 2.0).alone_ms(found) == pytest.approx((6.0 - both_ms / 3, 10.0 - both_ms / 2))


def test_what_never_ran_at_once_takes_as_long_as_one_after_the_other() -> None:
    found = Interference.of(Overlap(3.0, 5.0), Overlap(3.0, 5.0))
    assert found.together_ms(7.0, 2.0) == pytest.approx(9.0)


def test_a_forward_that_waits_for_the_backward_is_a_slowdown_and_no_error() -> None:
    found = Interference.of(Overlap(4.0, 4.0), Overlap(8.0, 4.0, both_ms=4.0))
    assert found.backward == 1.0 and found.forward > 10
    assert found.together_ms(4.0, 4.0) == pytest.approx(8.0, rel=0.02)


# --- when it is worth it


@pytest.mark.parametrize(("both_ms", "is_worth_it"), [(0.0, False), (1.4, False), (1.8, True), (8.0, True)])
def test_a_stream_is_used_where_both_take_clearly_less_than_their_sum(
    both_ms: float, is_worth_it: bool
) -> None:
    alone, together = Overlap(10.0, 10.0), Overlap(10.0, 10.0, both_ms)
    assert (choose("auto", alone, together) is not None) is is_worth_it
    assert choose("on", alone, together) is not None


def test_the_choice_and_its_ratio_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        choose("auto", Overlap(10.0, 10.0), Overlap(13.0, 15.0, both_ms=12.0))
        choose("auto", Overlap(10.0, 10.0), Overlap(10.0, 10.0))
    beside, behind = (record.getMessage() for record in caplog.records)
    assert "0.80 of one after the other" in beside and "beside decodes" in beside
    assert "1.00 of one after the other" in behind and "behind them" in behind


def test_only_a_gpu_of_one_rank_has_a_second_stream() -> None:
    config = EngineConfig(Path("model"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert may_use_side_stream(config, cuda, 1)
    assert not may_use_side_stream(config, cpu, 1) and not may_use_side_stream(config, cuda, 2)
    assert not may_use_side_stream(replace(config, backward_stream="off"), cuda, 1)
    for device, ranks in ((cpu, 1), (cuda, 2)):
        with pytest.raises(
            ValueError, match="backward_stream 'on': a second stream is for a GPU that one rank"
        ):
            may_use_side_stream(replace(config, backward_stream="on"), device, ranks)


# --- what is planned


def serving_world(beside: Interference | None, tpot_slo_ms: float = 30.0, num_jobs: int = 2) -> World:
    world = make_world(num_blocks=600, min_window=8)
    world.scheduler.finetuning.interference = beside
    for i in range(num_jobs):
        world.scheduler.add_job(make_job(f"j{i}", [60, 33] * 20, num_layers=40, batch_size=2))
    for i in range(3):
        world.scheduler.add(make_sequence(f"r{i}", 8, 40, i, tpot_slo_ms=tpot_slo_ms))
    return world


def test_a_batch_beside_decodes_is_predicted_by_the_interference_and_keeps_its_limit() -> None:
    world = serving_world(PAYS)
    latency, num_beside = world.scheduler.latency, 0
    for _ in range(150):
        batch = world.step()
        forward_ms = latency.forward_ms(batch.forward_work)
        backward_ms = sum(latency.step_ms(step.work) for step in batch.steps)
        if batch.interference and batch.steps:
            num_beside += 1
            assert batch.decodes and not batch.prompts and not batch.forwards
            windows_ms = PAYS.together_ms(forward_ms, backward_ms)
        else:
            windows_ms = forward_ms + backward_ms
        assert batch.predicted_ms - batch.updates_ms == pytest.approx(windows_ms, rel=0.02)
        if batch.decodes and batch.has_finetuning:
            assert batch.predicted_ms <= batch.limit_ms * 1.001
    assert num_beside > 20


def test_decodes_leave_time_for_more_of_the_backward_beside_them_than_behind() -> None:
    counts = []
    for beside in (None, PAYS):
        world = serving_world(beside, tpot_slo_ms=8.0)
        batches = [world.step() for _ in range(35)]
        counts.append(sum(step.window.num_tokens for batch in batches for step in batch.steps))
        assert max(gap for gaps in world.gaps_ms.values() for gap in gaps) < 3 * 8.0
    assert counts[1] > 1.2 * counts[0]


# --- what is computed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_layers=4)


class Watched:
    """A side stream that notes what it is told to do, among what else is computed."""

    def __init__(self, engine: Engine, inner: SideStream) -> None:
        self.notes: list[str] = []
        self._inner = inner
        engine.runner.side = self
        note = self.notes.append
        for owner, name in ((engine.runner, "_forward"), (engine.runner, "_update")):
            setattr(owner, name, self._noted(name, getattr(owner, name)))
        launch = engine.runner.launch
        engine.runner.launch = lambda batch: (note(kind_of(batch)), launch(batch))[1]  # type: ignore[method-assign]

    def _noted(self, name: str, inner: Any) -> Any:
        def call(*args: Any) -> Any:
            self.notes.append(name)
            return inner(*args)

        return call

    def watch(self, trainer: Any) -> None:
        trainer.backward = self._noted("step", trainer.backward)

    def follow(self) -> None:
        self.notes.append("follow")
        self._inner.follow()

    @contextmanager
    def _beside(self) -> Any:
        self.notes.append("[")
        with self._inner.beside():
            yield
        self.notes.append("]")

    def beside(self) -> AbstractContextManager[object]:
        found: AbstractContextManager[object] = self._beside()
        return found

    def join(self) -> None:
        self.notes.append("join")
        self._inner.join()

    def iterations(self) -> list[list[str]]:
        """Steps that follow each other as one."""
        found: list[list[str]] = []
        for note in self.notes:
            if note.startswith("batch"):
                found.append([note])
            elif note != "step" or found[-1][-1] != "step":
                found[-1].append(note)
        return found


def kind_of(batch: Batch) -> str:
    return f"batch {'beside' if batch.interference else 'behind'}"


def add_job(engine: Engine) -> None:
    data = make_dataset([40, 12, 33, 60, 21, 28, 8, 17], engine.model.config.vocab_size)
    config = JobConfig(n_epochs=2, batch_size=4, learning_rate=5e-3)
    engine.add_job("ftjob-1", config, METHODS["lora"], data)
    parameters = engine.runner.trainers["ftjob-1"].parameters
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(parameters.flat.shape, generator=generator) * 0.05
    parameters.flat.add_(noise.to(parameters.flat.device))
    parameters.refresh()


def train_beside_decodes(engine: Engine) -> tuple[list[list[int]], list[float]]:
    """Tokens of requests that run meanwhile, and the job's losses. Planned as if the machine were always as fast."""
    engine.scheduler.latency = make_latency()
    engine._learn = lambda batch, timing: None  # type: ignore[method-assign]
    names = [f"r{i}" for i in range(3)]
    for i, name in enumerate(names):
        engine.add(name, prompt_of(engine, 5 + 4 * i, seed=i), Sampling(max_tokens=60, temperature=i * 0.5))
    outputs, events = run(engine, *names)
    events += run(engine)[1]
    return [outputs[name].tokens for name in names], losses_of(events)


def losses_of(events: list[JobEvent]) -> list[float]:
    assert not [event.error for event in events if event.error is not None]
    reports = [event.report for event in events if event.report is not None]
    return [report.train_loss for report in reports if report.train_loss is not None]


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_a_job_and_requests_get_the_same_with_a_side_stream(folder: Path, ahead: bool) -> None:
    plain = make_engine(folder, scheduler=LIMITS, lanes=False)
    add_job(plain)
    tokens, losses = train_beside_decodes(plain)

    engine = make_engine(folder, scheduler=LIMITS, lanes=False, async_scheduling=ahead)
    engine.scheduler.finetuning.interference = PAYS
    add_job(engine)
    side = Watched(engine, InTurn())
    side.watch(engine.runner.trainers["ftjob-1"])
    found_tokens, found_losses = train_beside_decodes(engine)
    assert found_tokens == tokens and found_losses == pytest.approx(losses, abs=2e-4)

    orders = [notes for notes in side.iterations() if "step" in notes]
    beside = ["batch beside", "follow", "_forward", "[", "step", "]", "join"]
    behind = ["batch behind", "follow", "_forward", "follow", "[", "step", "]", "join"]
    assert beside in [order[:7] for order in orders] and behind in [order[:8] for order in orders]
    assert all(order in (beside, behind, [*beside, "_update"], [*behind, "_update"]) for order in orders)


def test_a_step_that_fails_beside_decodes_harms_nobody(folder: Path) -> None:
    engine = make_engine(folder, scheduler=LIMITS, lanes=False)
    engine.scheduler.finetuning.interference, engine.runner.side = PAYS, InTurn()
    add_job(engine)

    def backward(window: Window) -> None:
        raise RuntimeError("out of memory")

    engine.runner.trainers["ftjob-1"].backward = backward  # type: ignore[method-assign]
    engine.add("r", prompt_of(engine, 20), Sampling(max_tokens=20))
    outputs, events = run(engine, "r")
    assert len(outputs["r"].tokens) == 20
    assert [str(event.error) for event in events] == ["out of memory"]


def test_what_does_one_thing_after_the_other_is_found_to_gain_nothing(folder: Path) -> None:
    engine = make_engine(folder, scheduler=LIMITS, lanes=False)
    engine.runner.side = InTurn()
    policies = engine.admission.usual_policies()
    extent = measured_extent(engine.config, engine.runner, engine.max_model_len)
    assert measure_interference(engine.runner, extent, policies, "auto") is None
    found = measure_interference(engine.runner, extent, policies, "on")
    assert found is not None and found.together_ms(3.0, 4.0) == pytest.approx(7.0)
    assert not engine.runner.trainers


# --- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a second stream exists on a GPU only")
@pytest.mark.parametrize("offload", ["never", "always"])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_gradients_are_the_same_on_a_second_stream_of_a_gpu(folder: Path, kernels: Any, offload: Any) -> None:
    found = []
    for choice in ("off", "on"):
        engine = make_engine(
            folder,
            scheduler=LIMITS,
            device="cuda",
            kernels=kernels,
            block_size=16,
            backward_stream=choice,
            offload_activations=offload,
        )
        assert (engine.runner.side is not None) is (choice == "on")
        add_job(engine)
        parameters = engine.runner.trainers["ftjob-1"].parameters
        gradients: list[torch.Tensor] = []
        begin_step = parameters.begin_step

        def noted(rate: float, inner: Any = begin_step, of: Any = parameters, into: Any = gradients) -> Any:
            into.append(of.grad.clone())
            return inner(rate)

        parameters.begin_step = noted  # type: ignore[method-assign]
        num_beside = 0
        launch = engine.runner.launch

        def counted(batch: Batch, inner: Any = launch) -> Any:
            nonlocal num_beside
            num_beside += bool(batch.interference and batch.steps)
            return inner(batch)

        engine.runner.launch = counted  # type: ignore[method-assign]
        tokens, losses = train_beside_decodes(engine)
        found.append((tokens, losses, gradients[0].cpu()))
        assert (num_beside > 0) is (choice == "on")
    assert found[0][0] == found[1][0]
    assert found[1][1] == pytest.approx(found[0][1], abs=1e-3)
    assert found[0][2].abs().max() > 1e-3
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-3, atol=1e-5)
