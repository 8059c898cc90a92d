"""A job's plan: each token goes through each layer once and in order, however it is cut and given back."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gpu_worker.engine.latency import Curve
from services.gpu_worker.finetune.job import Phase, Window
from services.gpu_worker.finetune.packing import TrainingSequence
from tests.gpu_worker.virtual import make_job, make_latency, make_sequence, make_world

NUM_LAYERS = 3
Done = tuple[TrainingSequence, Window]


def check_sequence(sequence: TrainingSequence, windows: list[Window]) -> None:
    """Forward in the order of tokens and layers, the loss of each token, backward the other way round."""
    forward, backward, losses = Counter[tuple[int, int]](), Counter[tuple[int, int]](), Counter[int]()
    for window in windows:
        tokens = range(window.start, window.end)
        if window.phase is Phase.BACKWARD:
            assert window.layer is not None and all(losses[t] for t in tokens)
            assert not any(backward[window.layer, t] for t in range(window.end))
            assert window.layer == NUM_LAYERS - 1 or all(backward[window.layer + 1, t] for t in tokens)
            backward.update((window.layer, t) for t in tokens)
            continue
        for layer in range(NUM_LAYERS + 1) if window.layer is None else [window.layer]:
            assert layer == 0 or all(forward[layer - 1, t] for t in tokens)
            assert layer == NUM_LAYERS or all(forward[layer, t] for t in range(window.start))
            forward.update((layer, t) for t in tokens)
            losses.update(t for t in tokens if layer == NUM_LAYERS)
    assert all(forward[layer, t] == 1 for layer in range(NUM_LAYERS + 1) for t in range(sequence.num_tokens))
    depth = 0 if sequence.evaluation else NUM_LAYERS
    assert sum(backward.values()) == depth * sequence.num_tokens == len(backward)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_each_token_goes_through_each_layer_once_in_any_cut_and_after_steps_were_taken_back(
    seed: int,
) -> None:
    rng = random.Random(seed)
    job = make_job("j", [9, 14, 5, 20], batch_size=2, num_layers=NUM_LAYERS, in_flight=24, evaluate=True)
    done: list[Done] = []
    sequences: list[TrainingSequence] = []
    while job.phase is not Phase.DONE:
        if job.phase is Phase.REPORT:
            job.complete_report()
        elif job.phase is Phase.OPTIMIZER:
            job.complete_update(1)
        else:
            if not any(job.sequence is sequence for sequence in sequences):
                sequences.append(job.sequence)
            planned: list[Done] = []
            for _ in range(rng.randint(1, 6)):
                if job.phase in (Phase.FORWARD, Phase.BACKWARD) and job.sequence is sequences[-1]:
                    planned.append((job.sequence, job.next_step(rng.randint(1, 12))))
                    job.complete(planned[-1][1])
            for _ in range(rng.randint(0, len(planned))):
                job.take_back(*planned.pop())
            done += planned
            if job.can_pass_all_layers and job.sequence is sequences[-1] and rng.random() < 0.5:
                window = job.next_window(rng.randint(1, 12))
                done.append((job.sequence, window))
                job.complete(window)
    for sequence in sequences:
        check_sequence(sequence, [window for own, window in done if own is sequence])
    num_tokens = {
        kind: sum(s.num_tokens for s in sequences if s.evaluation is kind) for kind in (False, True)
    }
    assert job.served_tokens == pytest.approx(NUM_LAYERS * (2 * num_tokens[False] + num_tokens[True]))


def test_steps_that_ended_an_evaluation_are_taken_back_with_its_report() -> None:
    world = make_world(num_blocks=200, lane_latency=make_latency(1.2), idle_ms=400.0, min_window=8)
    job = make_job("j", [40, 30], num_layers=NUM_LAYERS, in_flight=80, evaluate=True)
    world.scheduler.add_job(job)
    batch = world.scheduler.schedule(world.now_s)
    assert batch.reports == [job] and job.phase is Phase.REPORT
    world.scheduler.give_back(batch, len(batch.steps) - 1)
    assert not batch.reports and (job.phase, job.layer) == (Phase.FORWARD, NUM_LAYERS)
    world.scheduler.advance(batch, world.now_s)
    assert world.scheduler.schedule(world.now_s).reports == [job]


@pytest.mark.parametrize(("layer_ms", "is_fused"), [(0.5, False), (50.0, True)])
def test_a_forward_goes_the_way_that_gets_more_done_in_its_time(layer_ms: float, is_fused: bool) -> None:
    latency = make_latency()
    latency.layer = Curve([0, 1000], [layer_ms / 10, layer_ms])
    world = make_world(num_blocks=200, latency=latency)
    world.scheduler.add_job(make_job("j", [60], num_layers=NUM_LAYERS, n_epochs=100))
    world.scheduler.add(make_sequence("r", 4, 40, tpot_slo_ms=20.0))
    batches = [world.step() for _ in range(30)]
    forward = [batch for batch in batches if batch.decodes and batch.num_tokens(Phase.FORWARD)]
    assert len(forward) > 3 and all(bool(batch.forwards) is is_fused for batch in forward)


def test_what_remains_of_a_sequence_is_not_begun_layer_by_layer_where_windows_are_faster() -> None:
    """Else the few milliseconds behind a window would decide the way of all the rest."""
    latency = make_latency()
    latency.layer = Curve([0, 1000], [0.01, 80.0])  # a small step fits where no window does
    world = make_world(num_blocks=200, latency=latency, min_window=8)
    world.scheduler.add_job(make_job("j", [60], num_layers=NUM_LAYERS, n_epochs=100))
    world.scheduler.add(make_sequence("r", 4, 60, tpot_slo_ms=6.0))
    batches = [world.step() for _ in range(40)]
    decoding = [batch for batch in batches if batch.decodes]
    assert sum(bool(batch.forwards) for batch in decoding) > 3
    assert not any(step.window.phase is Phase.FORWARD for batch in decoding for step in batch.steps)
