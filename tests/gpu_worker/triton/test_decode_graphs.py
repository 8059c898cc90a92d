"""Forwards over decodes padded to a recorded shape compute what unpadded ones do and write no other key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.gpu_worker.engine.batch import Batch
from services.gpu_worker.engine.model_runner import ModelRunner
from services.gpu_worker.engine.sequence import Sequence
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
}
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


def make_runner(model: Transformer, adapters: AdapterPool, with_graphs: bool) -> ModelRunner:
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
        runner.record_decodes(max_rows=8, max_model_len=MAX_LEN)
    return runner


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
    return runner.hidden(runner.lay_out(Batch(decodes=decodes), []))


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
    found = hidden_of(padded, decodes)
    assert padded.decode_graphs is not None and padded.decode_graphs.num_recorded == 1
    torch.testing.assert_close(found, hidden_of(plain, decodes), rtol=1e-4, atol=1e-5)
    for name in ("keys", "values"):
        ours, theirs = (getattr(runner.cache, name) for runner in (padded, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_shape_is_recorded_once_and_serves_whoever_comes(model: Transformer, adapters: AdapterPool) -> None:
    plain, padded = (make_runner(model, adapters, flag) for flag in (False, True))
    batches = [
        decodes_of([3, 17, 40], [None, "small", "small"]),
        decodes_of([8, 2, 5], ["small", None, None]),
        decodes_of([31, 4, 12, 7], ["wide", None, "small", "wide"]),
        decodes_of([8, 2, 5], ["small", None, None]),
    ]
    for decodes in batches:
        torch.testing.assert_close(
            hidden_of(padded, decodes), hidden_of(plain, decodes), rtol=1e-4, atol=1e-5
        )
    assert padded.decode_graphs is not None
    assert padded.decode_graphs.num_recorded == 2  # three rows, and four with more adapters


@pytest.mark.parametrize("user", ["dora", "embedding"])
def test_what_no_recording_serves_is_computed_without_one(
    model: Transformer, adapters: AdapterPool, user: str
) -> None:
    plain, padded = (make_runner(model, adapters, flag) for flag in (False, True))
    decodes = decodes_of([3, 17], [None, user])
    assert torch.equal(hidden_of(padded, decodes), hidden_of(plain, decodes))
    assert padded.decode_graphs is not None and padded.decode_graphs.num_recorded == 0


def test_more_decodes_than_were_planned_for_are_computed_without_padding(
    model: Transformer, adapters: AdapterPool
) -> None:
    runner = make_runner(model, adapters, True)
    hidden = hidden_of(runner, decodes_of([2] * 9, [None] * 9))
    assert len(hidden) == 9
    assert runner.decode_graphs is not None and runner.decode_graphs.num_recorded == 0
