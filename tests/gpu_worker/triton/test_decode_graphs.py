"""Decodes padded to a recorded shape get the tokens that unpadded ones do and write no other key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.gpu_worker.engine.batch import Batch
from services.gpu_worker.engine.decode_graphs import Decoded
from services.gpu_worker.engine.in_flight import RunResult
from services.gpu_worker.engine.model_runner import ModelRunner
from services.gpu_worker.engine.rows import lay_out
from services.gpu_worker.engine.sequence import Sampling, Sequence
from services.gpu_worker.kernels.backend import choose_kernels
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.model.adapter_pool import AdapterPool
from services.gpu_worker.model.peft import LoraConfig
from services.gpu_worker.model.peft_files import read_peft
from services.gpu_worker.model.transformer import Transformer
from tests.gpu_worker.engines import METHODS, TARGETS, make_adapter
from tests.gpu_worker.training import make_transformer

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 16, 48, 640
ADAPTERS = {
    "small": LoraConfig(2, 6.0, ("q_proj", "down_proj")),
    "wide": LoraConfig(8, 8.0, TARGETS),
    "dora": METHODS["dora"],
    "embedding": METHODS["lora-vocabulary"],
    "head": LoraConfig(4, 6.0, ("q_proj", "lm_head")),
}
ROOM = 1 << 40  # bytes for recordings, more than they ask for
LONG = 521  # more keys than one program reads


@pytest.fixture(scope="module")
def model(folder: Path, device: torch.device) -> Transformer:
    return make_transformer(
        folder, kernels=choose_kernels("triton", device), device=device, max_position=MAX_LEN
    )


@pytest.fixture(scope="module")
def adapters(model: Transformer) -> AdapterPool:
    pool = AdapterPool(len(ADAPTERS))
    for seed, (name, method) in enumerate(ADAPTERS.items()):
        pool.load(name, read_peft(model.weights, make_adapter(model.config, method, seed=seed), 64))
    return pool


def make_runner(
    model: Transformer, adapters: AdapterPool, with_graphs: bool, budget: int = ROOM
) -> ModelRunner:
    """Over a cache full of keys."""
    config, device = model.config, model.weights.device
    cache = KVCache(
        config.num_layers, NUM_BLOCKS, BLOCK_SIZE, config.num_kv_heads, config.head_dim, torch.float32, device
    )
    generator = torch.Generator().manual_seed(3)
    for cached in (cache.keys, cache.values):
        cached.copy_(torch.randn(cached.shape, generator=generator))
    runner = ModelRunner(model, cache, adapters)
    if with_graphs:
        runner.record_decodes(max_rows=8, max_model_len=MAX_LEN, budget=budget)
    return runner


def num_recorded(runner: ModelRunner) -> int:
    assert runner.decode_graphs is not None
    return runner.decode_graphs.num_recorded


def decodes_of(lengths: list[int], users: list[str | None]) -> list[Sequence]:
    """Of sequences all but whose last token has been computed."""
    found, block = [], 0
    for number, (length, user) in enumerate(zip(lengths, users, strict=True)):
        pages = -(-length // BLOCK_SIZE)
        table = [(7 * i + 3) % NUM_BLOCKS for i in range(block, block + pages)]  # in no order
        tokens = [(5 * i + number) % 300 for i in range(length)]
        found.append(
            Sequence(
                f"r{number}", tokens, length, adapter=user, block_table=table, num_computed_tokens=length - 1
            )
        )
        block += pages
    assert block <= NUM_BLOCKS
    return found


def hidden_of(runner: ModelRunner, decodes: list[Sequence]) -> torch.Tensor:
    return runner.hidden(lay_out(Batch(decodes=decodes), []))


def decoded_of(runner: ModelRunner, decodes: list[Sequence]) -> Decoded | None:
    return runner.decoded(lay_out(Batch(decodes=decodes), []))


CASES = {
    "base": ([3, 17, 40], [None, None, None]),
    "exactly a shape": ([16, 1, 33, 5], [None, "small", None, "small"]),
    "two adapters": ([3, 9, 70, 18, 2], ["wide", "small", None, "wide", "wide"]),
    "long": ([9, LONG, 20], [None, "wide", None]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_padded_batch_computes_what_it_does_without_padding(
    model: Transformer, adapters: AdapterPool, name: str
) -> None:
    plain, padded = (make_runner(model, adapters, flag) for flag in (False, True))
    decodes = decodes_of(*CASES[name])
    expected = hidden_of(plain, decodes)
    for recorded in (0, 1):  # launched as it is when it first comes
        found = decoded_of(padded, decodes)
        assert found is not None and num_recorded(padded) == recorded
        torch.testing.assert_close(found.hidden, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.logits, model.logits(expected), rtol=1e-4, atol=1e-4)
        assert found.tokens.tolist() == found.logits.argmax(-1).tolist()
    for name in ("keys", "values"):
        ours, theirs = (getattr(runner.cache, name) for runner in (padded, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_shape_is_recorded_once_and_serves_whoever_comes(model: Transformer, adapters: AdapterPool) -> None:
    plain, padded = (make_runner(model, adapters, flag) for flag in (False, True))
    batches = [
        decodes_of([3, 17, 40], [None, "small", "small"]),
        decodes_of([8, 2, 5], ["small", None, None]),
        decodes_of([31, 4, 12, 7], ["wide", None, "small", "wide"]),  # four rows with more adapters
        decodes_of([8, 2, 5], ["small", None, None]),
    ]
    counts = []
    for decodes in batches:
        found = decoded_of(padded, decodes)
        assert found is not None
        torch.testing.assert_close(found.hidden, hidden_of(plain, decodes), rtol=1e-4, atol=1e-5)
        counts.append(num_recorded(padded))
    assert counts == [0, 1, 1, 1]


def test_without_memory_for_recordings_decodes_are_launched(
    model: Transformer, adapters: AdapterPool
) -> None:
    plain, padded = make_runner(model, adapters, False), make_runner(model, adapters, True, budget=1)
    decodes = decodes_of(*CASES["two adapters"])
    for _ in range(3):
        found = decoded_of(padded, decodes)
        assert found is not None
        torch.testing.assert_close(found.hidden, hidden_of(plain, decodes), rtol=1e-4, atol=1e-5)
    assert num_recorded(padded) == 0
    assert padded.decode_graphs is not None and padded.decode_graphs.size_bytes > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs and their memory exist on a GPU only")
def test_graphs_count_what_they_take_of_a_gpu(model: Transformer, adapters: AdapterPool) -> None:
    runner = make_runner(model, adapters, True)
    graphs = runner.decode_graphs
    assert graphs is not None
    graphs.record_ahead(budget_s=20.0)
    torch.cuda.synchronize()
    before, free = graphs.size_bytes, torch.cuda.mem_get_info()[0]
    for number in range(1, 9):
        for _ in range(2):
            decoded_of(runner, decodes_of([17] * number, ["wide"] * number))
    assert 0 <= graphs.size_bytes - before <= free - torch.cuda.mem_get_info()[0] + (64 << 20)


# --- what is drawn

HOW = {
    "greedy": Sampling(),
    "random": Sampling(temperature=1.0, top_p=0.9, seed=5),
    "few": Sampling(temperature=0.7, top_k=20, min_p=0.01, seed=1 << 63),
    "penalised": Sampling(temperature=1.0, seed=3, frequency_penalty=1.5, repetition_penalty=1.3),
    "biased": Sampling(logit_bias=((7, 50.0),), logprobs=2),
    "logprobs": Sampling(temperature=1.0, seed=9, logprobs=3),
}


def run_twice(runner: ModelRunner, decodes: list[Sequence]) -> RunResult:
    """Where forwards are recorded, the second is."""
    runner.run(Batch(decodes=decodes))
    return runner.run(Batch(decodes=decodes))


@pytest.mark.parametrize(
    ("how", "users"),
    [
        (["greedy", "random", "few"], [None, "small", None]),
        (["random", "penalised", "biased"], [None, None, "wide"]),
        (["logprobs", "random", "greedy"], [None, None, None]),
        (["random", "few", "logprobs"], [None, "head", None]),
    ],
    ids=["plain", "penalties", "logprobs", "head"],
)
def test_everybody_draws_what_they_draw_without_a_recording(
    model: Transformer, adapters: AdapterPool, how: list[str], users: list[str | None]
) -> None:
    plain, padded = (make_runner(model, adapters, flag) for flag in (False, True))
    decodes = [
        replace(sequence, sampling=HOW[name])
        for sequence, name in zip(decodes_of([3, 17, 40], users), how, strict=True)
    ]
    found, expected = run_twice(padded, decodes).sampled, run_twice(plain, decodes).sampled
    assert num_recorded(padded) == 1
    assert {s.sequence.request_id: s.token for s in found} == {
        s.sequence.request_id: s.token for s in expected
    }
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob and theirs.logprob:
            assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-4)
            assert [t for t, _ in ours.logprob.top] == [t for t, _ in theirs.logprob.top]


def test_drawn_tokens_outlive_the_next_batch(model: Transformer, adapters: AdapterPool) -> None:
    runner = make_runner(model, adapters, True)
    first, second = decodes_of([3, 17], [None, None]), decodes_of([40, 9], [None, None])
    expected = [item.token for item in run_twice(runner, first).sampled]
    flight = runner.launch(Batch(decodes=first))
    others = [item.token for item in run_twice(runner, second).sampled]
    assert flight.drawn is not None and flight.drawn.tokens.tolist() == expected != others


# --- what is not recorded


@pytest.mark.parametrize("user", ["dora", "embedding"])
def test_what_no_recording_serves_is_computed_without_one(
    model: Transformer, adapters: AdapterPool, user: str
) -> None:
    plain, padded = (make_runner(model, adapters, flag) for flag in (False, True))
    decodes = decodes_of([3, 17], [None, user])
    assert decoded_of(padded, decodes) is None
    tokens = [[item.token for item in run_twice(runner, decodes).sampled] for runner in (padded, plain)]
    assert tokens[0] == tokens[1] and num_recorded(padded) == 0


def test_more_decodes_than_were_planned_for_are_computed_without_padding(
    model: Transformer, adapters: AdapterPool
) -> None:
    runner = make_runner(model, adapters, True)
    decodes = decodes_of([2] * 9, [None] * 9)
    assert decoded_of(runner, decodes) is None and len(run_twice(runner, decodes).sampled) == 9
    assert num_recorded(runner) == 0
