"""A request's tokens depend on the request alone: not on its neighbours, its pieces, its luck or its worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.requests import InvalidRequest
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import generate, make_adapter, make_engine, prompt_of, run, together, tokens_of
from tests.gpu_worker.training import make_dataset

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 23, 31, 32, 40, 55)
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tied=False)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    engine = make_engine(folder)
    return [prompt_of(engine, length, seed=length) for length in LENGTHS]


def samplings(kind: str) -> list[Sampling]:
    if kind == "greedy":
        return [Sampling(max_tokens=NUM_TOKENS)] * len(LENGTHS)
    return [
        Sampling(max_tokens=NUM_TOKENS, temperature=1.0, top_p=0.95, seed=seed)
        for seed in range(len(LENGTHS))
    ]


@pytest.fixture(scope="module")
def alone(folder: Path, prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    """What each request gives when nobody else is there, nothing is cached and prompts are computed whole."""
    found: dict[str, list[list[int]]] = {}
    for kind in ("greedy", "sampled"):
        found[kind] = []
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings(kind), strict=True)):
            if index % 4 == 0:
                engine = make_engine(folder)
            output = generate(engine, prompt, sampling, cache_salt=str(index))
            assert output.cached_tokens == 0 and len(output.tokens) == NUM_TOKENS
            found[kind].append(output.tokens)
    return found


def add_job(engine: Engine, job_id: str, seed: int = 0, **config: Any) -> None:
    dataset = make_dataset([30, 41, 17, 25], engine.model.config.vocab_size, seed=seed)
    lora = LoraConfig(4, 8.0, ("q_proj", "v_proj", "up_proj"))
    engine.add_job(
        job_id,
        JobConfig(**{"batch_size": 2, "learning_rate": 0.05, "n_epochs": 500, **config}),
        lora,
        dataset,
    )


# --- neighbours and pieces


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_tokens_are_the_same_in_a_batch_of_sixteen(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[list[int]]], kind: str
) -> None:
    engine = make_engine(folder, scheduler={"max_num_batched_tokens": 512})
    assert tokens_of(together(engine, prompts, samplings(kind))) == alone[kind]


@pytest.mark.parametrize("budget", [3, 7, 19])
def test_tokens_are_the_same_when_prompts_are_computed_in_pieces(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[list[int]]], budget: int
) -> None:
    engine = make_engine(folder, scheduler={"max_num_batched_tokens": budget})
    assert tokens_of(together(engine, prompts, samplings("sampled"))) == alone["sampled"]


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_tokens_are_the_same_when_sequences_are_preempted(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[list[int]]], kind: str
) -> None:
    engine = make_engine(folder, num_blocks=20, scheduler={"max_model_len": 72})
    assert tokens_of(together(engine, prompts, samplings(kind))) == alone[kind]
    assert engine.scheduler.num_preempted > 3
    assert engine.blocks.num_free_blocks == 20


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_tokens_are_the_same_while_jobs_train_in_the_same_iterations(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[list[int]]], num_jobs: int
) -> None:
    engine = make_engine(folder)
    for index in range(num_jobs):
        add_job(engine, f"ftjob-{index}", seed=index)
    shared = 0
    original = engine.runner.launch

    def counting(batch: Any) -> Any:
        nonlocal shared
        shared += bool(batch.chunks and (batch.forwards or batch.steps))
        return original(batch)

    engine.runner.launch = counting  # type: ignore[method-assign]
    assert tokens_of(together(engine, prompts, samplings("greedy"))) == alone["greedy"]
    assert shared > 5
    assert all(engine.job(f"ftjob-{i}").step > 0 for i in range(num_jobs))


def test_jobs_give_their_memory_to_requests_and_both_finish(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[list[int]]]
) -> None:
    engine = make_engine(folder, num_blocks=24, scheduler={"max_model_len": 72})
    add_job(engine, "ftjob-1", n_epochs=2)
    for _ in range(3):
        engine.step()
    assert tokens_of(together(engine, prompts, samplings("greedy"))) == alone["greedy"]
    _, events = run(engine)
    assert any(event.finished for event in events)
    assert engine.blocks.num_free_blocks == 24


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_a_block_held_before_never_reaches_its_next_owner(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[list[int]]], value: float
) -> None:
    engine = make_engine(folder)
    engine.cache.keys.fill_(value)  # as a job that diverged, or an adapter that overflows, leaves it
    engine.cache.values.fill_(value)
    assert tokens_of(together(engine, prompts, samplings("greedy"))) == alone["greedy"]


# --- the prefix cache


def test_a_repeated_prompt_is_found_in_the_cache_and_gives_the_same_tokens(folder: Path) -> None:
    engine = make_engine(folder)
    prompt, sampling = prompt_of(engine, 41), Sampling(max_tokens=8)
    first = generate(engine, prompt, sampling, cache_salt="tenant")
    again = generate(engine, prompt, sampling, cache_salt="tenant")
    longer = generate(engine, [*prompt, *first.tokens, 5, 6], sampling, cache_salt="tenant")
    assert (first.cached_tokens, again.cached_tokens, longer.cached_tokens) == (0, 40, 48)
    assert first.tokens == again.tokens
    assert longer.tokens == generate(make_engine(folder), [*prompt, *first.tokens, 5, 6], sampling).tokens


def test_prefixes_of_another_tenant_or_adapter_are_not_found(folder: Path) -> None:
    engine = make_engine(folder)
    for digest in ("a" * 64, "b" * 64):
        engine.load_adapter(digest, make_adapter(engine.model.config, seed=int(digest[0], 16)))
    prompt, sampling = prompt_of(engine, 30), Sampling(max_tokens=4)
    for options in (
        {"cache_salt": "x"},
        {"cache_salt": "y"},
        {"cache_salt": "x", "adapter": "a" * 64},
        {"cache_salt": "x", "adapter": "b" * 64},
    ):
        assert generate(engine, prompt, sampling, **options).cached_tokens == 0
        assert generate(engine, prompt, sampling, **options).cached_tokens == 28


def test_prompts_that_share_a_beginning_share_blocks_while_they_run(
    folder: Path, prompts: list[list[int]]
) -> None:
    engine = make_engine(folder)
    shared = prompt_of(engine, 40, seed=99)
    generate(engine, shared, Sampling(max_tokens=1))
    used = engine.blocks.num_blocks - engine.blocks.num_free_blocks
    assert used == 0
    outputs = together(engine, [[*shared, 3 + i] for i in range(6)], [Sampling(max_tokens=6)] * 6)
    assert all(output.cached_tokens == 40 for output in outputs)
    fresh = make_engine(folder)
    expected = [
        generate(fresh, [*shared, 3 + i], Sampling(max_tokens=6), cache_salt=str(i)) for i in range(6)
    ]
    assert tokens_of(outputs) == tokens_of(expected)


# --- the life of a request


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize("num_emitted", [1, 5, NUM_TOKENS - 1])
def test_a_request_goes_on_where_a_crashed_worker_left_it(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[list[int]]], kind: str, num_emitted: int
) -> None:
    engine = make_engine(folder)
    for index in (0, 7, 15):
        expected = alone[kind][index]
        output = generate(
            engine,
            prompts[index],
            samplings(kind)[index],
            emitted=expected[:num_emitted],
            cache_salt=str(index),
        )
        assert expected[:num_emitted] + output.tokens == expected
        assert output.finish == "length"


def test_an_aborted_request_frees_its_blocks_at_once(folder: Path, prompts: list[list[int]]) -> None:
    engine = make_engine(folder, scheduler={"max_num_seqs": 3, "max_num_batched_tokens": 16})
    for index in range(5):
        engine.add(f"r{index}", prompts[-1 - index], Sampling(max_tokens=50))
    for _ in range(6):
        engine.step()
    for index in (0, 4, 2, 1, 3):  # decoding, catching up and waiting ones
        engine.abort(f"r{index}")
        engine.abort("unknown")
        engine.blocks.check_integrity()
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks
    assert not engine.has_work


def test_a_stop_token_ends_a_request_and_is_no_part_of_it(
    folder: Path, prompts: list[list[int]], alone: dict[str, list[list[int]]]
) -> None:
    engine = make_engine(folder)
    expected = alone["greedy"][9]
    stop = expected[4]
    first = expected.index(stop)
    stopped = generate(engine, prompts[9], Sampling(NUM_TOKENS, stop_token_ids=frozenset({stop})))
    ignored = generate(engine, prompts[9], Sampling(NUM_TOKENS))
    assert (stopped.tokens, stopped.finish) == (expected[:first], "stop")
    assert (ignored.tokens, ignored.finish) == (expected, "length")


def test_a_request_ends_at_the_longest_length_that_the_engine_serves(folder: Path) -> None:
    engine = make_engine(folder, scheduler={"max_model_len": 40})
    output = generate(engine, prompt_of(engine, 30), Sampling(max_tokens=10))
    assert len(output.tokens) == 10 and output.finish == "length"


# --- requests that cannot be served


@pytest.mark.parametrize(
    ("prompt", "sampling", "options", "words"),
    [
        ([], Sampling(), {}, "at least one token"),
        ([1, -1], Sampling(), {}, "each in"),
        ([1, 10**6], Sampling(), {}, "each in"),
        ([5] * 250, Sampling(max_tokens=7), {}, "exceed 256"),
        ([5], Sampling(max_tokens=-1), {}, "max_tokens"),
        ([5], Sampling(logit_bias=((10**6, 1.0),)), {}, "logit_bias"),
        ([5], Sampling(logit_bias=((5, float("nan")),)), {}, "logit_bias"),
        ([5], Sampling(temperature=float("nan")), {}, "temperature"),
        ([5], Sampling(temperature=1.0, top_p=0.0), {}, "top_p"),
        ([5], Sampling(repetition_penalty=0.0), {}, "repetition_penalty"),
        ([5], Sampling(max_tokens=3), {"emitted": [5, 10**6]}, "each in"),
        ([5], Sampling(max_tokens=3), {"emitted": [5, 6, 7]}, "already"),
        ([5], Sampling(), {"adapter": "f" * 64}, "not loaded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_cannot_be_served_is_refused_without_harm(
    folder: Path,
    prompts: list[list[int]],
    alone: dict[str, list[list[int]]],
    prompt: list[int],
    sampling: Sampling,
    options: dict[str, Any],
    words: str,
) -> None:
    engine = make_engine(folder)
    engine.add("good", prompts[8], samplings("greedy")[8])
    with pytest.raises(InvalidRequest, match=words):
        engine.add("bad", prompt, sampling, **options)
    assert run(engine, "good")[0]["good"].tokens == alone["greedy"][8]
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks and not engine.has_work


def test_a_request_id_in_use_is_refused(folder: Path) -> None:
    engine = make_engine(folder)
    engine.add("r", [5], Sampling())
    with pytest.raises(InvalidRequest, match="already running"):
        engine.add("r", [6], Sampling())
