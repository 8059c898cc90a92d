"""Iterations that are launched before the one before is read: the same tokens and losses, none lost, none doubled."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.gpu_worker.engine.config import EngineConfig, is_asynchronous
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import JobEvent
from services.gpu_worker.engine.sequence import AIM, LONGEST_GAP, Sampling, Sequence
from services.gpu_worker.engine.slo import SLO
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import (
    Output,
    generate,
    make_adapter,
    make_engine,
    make_timeless_engine,
    prompt_of,
    run,
    together,
    tokens_of,
)
from tests.gpu_worker.test_engine_random import Life, make_loaded_engine
from tests.gpu_worker.training import make_dataset

JOB = JobConfig(n_epochs=3, batch_size=2, learning_rate=0.01)
LORA = LoraConfig(4, 8.0, ("q_proj", "down_proj"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen3", tied=False)


def add_job(engine: Engine, config: JobConfig = JOB, lengths: tuple[int, ...] = (20, 9, 31, 14, 26)) -> None:
    vocab = engine.model.config.vocab_size
    validation = make_dataset([12, 7], vocab, seed=8)
    engine.add_job("ftjob-1", config, LORA, make_dataset(list(lengths), vocab, seed=7), validation)


def losses(events: list[JobEvent]) -> list[float | None]:
    reports = [event.report for event in events if event.report is not None]
    return [r.valid_loss if r.train_loss is None else r.train_loss for r in reports]


# --- requests


@pytest.mark.parametrize("seed", range(3))
def test_requests_end_with_their_own_tokens_whatever_happens_around_them(folder: Path, seed: int) -> None:
    """Arrivals, aborts, stop tokens, jobs that come and go, adapters, shared prefixes, and too few blocks."""
    rng = random.Random(seed)
    num_blocks = rng.choice([21, 30])
    engine = make_loaded_engine(
        folder, num_blocks=num_blocks, budget=rng.choice([17, 64]), async_scheduling=True
    )
    life = Life(engine, rng)
    life.live()
    assert not life.running and len(life.finished) > 20
    assert engine.blocks.num_free_blocks == num_blocks
    assert not any(slot.pins for slot in engine.adapters._slots.values())
    quiet = make_loaded_engine(folder, async_scheduling=False)
    for number, (request, tokens) in enumerate(life.finished):
        alone = generate(
            quiet, list(request.prompt), request.sampling, adapter=request.adapter, cache_salt=str(number)
        )
        assert tokens == alone.tokens, request


def test_an_iteration_is_launched_before_the_tokens_of_the_one_before_are_read(folder: Path) -> None:
    engine = make_engine(folder, async_scheduling=True)
    engine.add("r", prompt_of(engine, 5), Sampling(max_tokens=3))
    (sequence,) = engine.scheduler.waiting
    counts = []
    while engine.has_work:
        events = engine.step().tokens
        counts.append((len(events), sequence.num_output_tokens, sequence.num_pending_tokens))
    assert counts == [(1, 1, 1), (1, 2, 1), (1, 3, 0)]


def test_a_sequence_known_to_end_is_not_scheduled_again(folder: Path) -> None:
    engine = make_engine(folder, async_scheduling=True)
    engine.add("r", prompt_of(engine, 5), Sampling(max_tokens=4))
    decoded = 0
    while engine.has_work:
        decoded += engine.step().stats.num_decode_tokens
    assert decoded == 3


def test_after_a_stop_token_one_row_is_dropped_and_nobody_hears_of_it(folder: Path) -> None:
    plain = make_engine(folder, async_scheduling=False)
    prompt = prompt_of(plain, 6)
    free = generate(plain, prompt, Sampling(max_tokens=12, temperature=1.0, seed=3)).tokens
    stop = Sampling(max_tokens=12, temperature=1.0, seed=3, stop_token_ids=frozenset({free[5]}))
    expected = free[: free.index(free[5])]
    engine = make_engine(folder, async_scheduling=True)
    engine.add("r", prompt, stop)
    output, decoded = Output(), 0
    while engine.has_work:
        result = engine.step()
        decoded += result.stats.num_decode_tokens
        for event in result.tokens:
            output.add(event)  # fails after an end
    assert (output.tokens, output.finish) == (expected, "stop")
    assert decoded == len(expected) + 1
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks


def test_draws_that_depend_on_the_tokens_before_them_know_the_newest(folder: Path) -> None:
    settings = [
        Sampling(max_tokens=15, repetition_penalty=3.0),
        Sampling(max_tokens=15, temperature=0.8, seed=2, frequency_penalty=1.5, presence_penalty=1.0),
        Sampling(max_tokens=15, temperature=1.2, seed=4, top_k=9, top_p=0.8, logprobs=3),
        Sampling(max_tokens=15, repetition_penalty=1.5, logit_bias=((5, 4.0), (9, -8.0)), logprobs=0),
        Sampling(max_tokens=15, temperature=0.7, seed=6, min_p=0.05),
    ]
    outputs = []
    for ahead in (False, True):
        engine = make_engine(folder, async_scheduling=ahead)
        prompts = [prompt_of(engine, 4 + 5 * i, seed=i) for i in range(len(settings))]
        outputs.append(together(engine, prompts, settings))
    assert tokens_of(outputs[0]) == tokens_of(outputs[1])
    for expected, found in zip(*outputs, strict=True):
        assert [entry.logprob for entry in found.logprobs] == pytest.approx(
            [entry.logprob for entry in expected.logprobs], abs=1e-4
        )
        assert [[i for i, _ in entry.top] for entry in found.logprobs] == [
            [i for i, _ in entry.top] for entry in expected.logprobs
        ]


@pytest.mark.parametrize("budget", [9, 64])
def test_prompts_have_their_logprobs_with_the_first_token(folder: Path, budget: int) -> None:
    found = []
    for ahead in (False, True):
        engine = make_engine(folder, async_scheduling=ahead, scheduler={"max_num_batched_tokens": budget})
        prompts = [prompt_of(engine, n, seed=n) for n in (1, 23, 40)]
        how = [Sampling(max_tokens=n, prompt_logprobs=2) for n in (4, 0, 1)]
        outputs = together(engine, prompts, how)
        found.append([[None if p is None else p.logprob for p in o.prompt_logprobs or []] for o in outputs])
    for expected, own in zip(*found, strict=True):
        assert own[0] is None and own[1:] == pytest.approx(expected[1:], abs=1e-4)


def test_prefixes_are_found_as_soon_as_their_blocks_are_full_of_known_tokens(folder: Path) -> None:
    engine = make_engine(folder, async_scheduling=True)
    prompt = prompt_of(engine, 14)
    first = generate(engine, prompt, Sampling(max_tokens=11))
    again = generate(engine, prompt, Sampling(max_tokens=11))
    longer = generate(engine, prompt + first.tokens + [5], Sampling(max_tokens=2))
    assert (first.cached_tokens, again.cached_tokens, longer.cached_tokens) == (0, 12, 24)
    assert first.tokens == again.tokens


def test_a_sequence_preempted_with_a_token_on_its_way_goes_on_where_it_was(folder: Path) -> None:
    scheduler = {"max_num_seqs": 6, "max_model_len": 60}
    quiet = make_engine(folder, async_scheduling=False)
    engine = make_engine(folder, async_scheduling=True, num_blocks=16, scheduler=scheduler)
    prompts = [prompt_of(engine, 8, seed=i) for i in range(6)]
    how = [Sampling(max_tokens=30, temperature=i % 2, seed=i) for i in range(6)]
    outputs = together(engine, prompts, how)
    assert engine.scheduler.num_preempted > 3
    assert tokens_of(outputs) == [
        generate(quiet, prompt, sampling).tokens for prompt, sampling in zip(prompts, how, strict=True)
    ]


def test_an_aborted_request_is_silent_from_then_on_and_its_name_is_free(folder: Path) -> None:
    engine = make_engine(folder, async_scheduling=True)
    engine.load_adapter("a" * 64, make_adapter(engine.model.config))
    engine.add("r", prompt_of(engine, 5), Sampling(max_tokens=20), adapter="a" * 64)
    assert engine.step().tokens
    engine.abort("r")
    prompt = prompt_of(engine, 9, seed=4)
    engine.add("r", prompt, Sampling(max_tokens=6))
    outputs, _ = run(engine, "r")
    assert outputs["r"].tokens == generate(make_engine(folder), prompt, Sampling(max_tokens=6)).tokens
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks
    assert not engine.has_work


# --- jobs


def test_a_job_beside_requests_learns_the_same(folder: Path) -> None:
    curves, outputs = [], []
    for ahead in (False, True):
        engine = make_timeless_engine(folder, async_scheduling=ahead)
        add_job(engine)
        names = [f"r{i}" for i in range(6)]
        for i, name in enumerate(names):
            engine.add(name, prompt_of(engine, 3 + 4 * i, seed=i), Sampling(max_tokens=9, seed=i))
        found, events = run(engine, *names)
        events += run(engine)[1]
        assert [event.finished for event in events] == [False] * (len(events) - 1) + [True]
        steps = [event.report.step for event in events if event.report is not None]
        assert steps == sorted(steps)
        curves.append(losses(events))
        outputs.append([found[name].tokens for name in names])
    assert outputs[0] == outputs[1]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5) and len(curves[0]) == 3 * 3 + 4


def test_a_checkpoint_between_two_steps_of_the_engine_loses_nothing(folder: Path) -> None:
    whole = make_timeless_engine(folder, async_scheduling=True)
    add_job(whole)
    expected = losses(run(whole)[1])
    first = make_timeless_engine(folder, async_scheduling=True)
    add_job(first)
    events: list[JobEvent] = []
    while first.job("ftjob-1").step < 5:
        events += first.step().jobs
    files, step = first.checkpoint_job("ftjob-1"), first.job("ftjob-1").step
    while len([event for event in events if event.report and event.report.train_loss is not None]) < step:
        events += first.step().jobs
    before = [event for event in events if event.report and event.report.step <= step]
    second = make_timeless_engine(folder, async_scheduling=True)
    vocab = second.model.config.vocab_size
    dataset = make_dataset([20, 9, 31, 14, 26], vocab, seed=7)
    validation = make_dataset([12, 7], vocab, seed=8)
    second.add_job("ftjob-1", JOB, LORA, dataset, validation, checkpoint=files)
    found = losses(before) + losses(run(second)[1])
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_job_removed_in_mid_flight_is_not_heard_of_again(folder: Path) -> None:
    engine = make_timeless_engine(folder, async_scheduling=True)
    add_job(engine)
    engine.step()
    engine.remove_job("ftjob-1")
    add_job(engine, replace(JOB, seed=5))
    _, events = run(engine)
    fresh = make_timeless_engine(folder, async_scheduling=False)
    add_job(fresh, replace(JOB, seed=5))
    assert losses(events) == pytest.approx(losses(run(fresh)[1]), abs=1e-5)
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks


def test_a_job_that_diverges_ends_with_its_error_alone(folder: Path) -> None:
    engine = make_timeless_engine(folder, async_scheduling=True)
    add_job(engine)
    engine.add("r", prompt_of(engine, 5), Sampling(max_tokens=30))
    engine.runner.trainers["ftjob-1"].parameters.flat.fill_(float("nan"))
    engine.runner.trainers["ftjob-1"].parameters.refresh()
    outputs, events = run(engine, "r")
    events += run(engine)[1]
    assert [event.job_id for event in events if event.error is not None] == ["ftjob-1"]
    assert events[-1].error is not None and not any(event.finished for event in events)
    assert outputs["r"].finish == "length" and not engine.has_work


# --- time


def test_a_token_on_its_way_moves_the_next_deadline_as_if_it_came_when_expected() -> None:
    slo = SLO(tpot_ms=100.0, ttft_ms=1000.0)
    sequence = Sequence("r", [1, 2], 2, Sampling(max_tokens=9), slo=slo, arrival_s=5.0)
    assert sequence.deadline_s == 6.0
    sequence.expect(5.5)
    assert sequence.deadline_s == pytest.approx(5.5 + AIM * 0.1)
    sequence.fill(7, 5.6)
    assert (sequence.tokens, sequence.first_token_s) == ([1, 2, 7], 5.6)
    assert sequence.deadline_s == pytest.approx(5.6 + AIM * 0.1)
    sequence.expect(5.65)
    sequence.expect(5.7)
    assert sequence.deadline_s == pytest.approx(5.6 + AIM * 0.3)
    sequence.fill(8, 5.64)
    assert (sequence.num_tokens, sequence.num_known_tokens, sequence.last_token_s) == (5, 4, 5.64)
    sequence.expect(9.0)
    sequence.fill(9, 5.7)
    assert sequence.deadline_s == pytest.approx(min(5.6 + AIM * 0.4, 9.0 + LONGEST_GAP * 0.1))
    sequence.end()
    assert sequence.tokens == [1, 2, 7, 8, 9] and sequence.is_over


def test_iterations_beside_nobody_are_half_as_long_where_two_are_under_way(folder: Path) -> None:
    ahead, plain = (make_engine(folder, async_scheduling=choice) for choice in (True, False))
    assert 2 * ahead.scheduler.config.idle_ms == plain.scheduler.config.idle_ms == 1000.0


def test_scheduling_ahead_is_for_gpus_unless_the_config_says_otherwise() -> None:
    config = EngineConfig(Path("model"))
    assert is_asynchronous(config, torch.device("cuda"), 1) and not is_asynchronous(config, CPU, 1)
    assert is_asynchronous(replace(config, async_scheduling=True), CPU, 1)
    assert not is_asynchronous(replace(config, async_scheduling=False), torch.device("cuda"), 1)
    assert not is_asynchronous(config, torch.device("cuda"), 2)
    with pytest.raises(ValueError, match="async_scheduling: 2 ranks that share a model schedule in step"):
        is_asynchronous(replace(config, async_scheduling=True), CPU, 2)
