"""Jobs, datasets and checkpoints that cannot be are refused with words, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from services.gpu_worker.finetune.checkpoint import InvalidCheckpoint
from services.gpu_worker.finetune.dataset import Dataset, InvalidDataset
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import make_engine, run
from tests.gpu_worker.training import make_dataset

LORA = LoraConfig(4, 8.0, ("q_proj", "v_proj", "gate_proj", "down_proj"))
JOB = JobConfig(n_epochs=4, batch_size=2, learning_rate=0.01, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tied=False)


def dataset_of(tokens: list[int], mask: list[int], offsets: list[int]) -> Dataset:
    return Dataset(np.array(tokens, np.int32), np.array(mask, np.uint8), np.array(offsets, np.int64))


@pytest.mark.parametrize(
    ("training", "validation", "lora", "words"),
    [
        (dataset_of([5] * 257, [1] * 257, [0, 257]), None, LORA, "257 tokens exceeds 256 in flight"),
        (dataset_of([5, 6], [1, 1], [0, 2]), dataset_of([5] * 300, [1] * 300, [0, 300]), LORA, "300 tokens"),
        (dataset_of([5, 10**6], [1, 1], [0, 2]), None, LORA, "token 1000000"),
        (dataset_of([5, -3], [1, 1], [0, 2]), None, LORA, "token -3"),
        (dataset_of([5, 6, 7, 8], [1, 1, 1, 0], [0, 2, 4]), None, LORA, "example 1 .*no training target"),
        (dataset_of([5, 6], [1, 1], [0, 2]), None, replace(LORA, rank=1000), "rank 1000"),
        (dataset_of([5, 6], [1, 1], [0, 2]), None, replace(LORA, targets=("c_attn",)), "c_attn"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_job_that_cannot_run_is_refused_with_words(
    folder: Path, training: Dataset, validation: Dataset | None, lora: LoraConfig, words: str
) -> None:
    engine = make_engine(folder)
    with pytest.raises(ValueError, match=words):
        engine.add_job("ftjob-1", JOB, lora, training, validation)
    assert engine.can_add_job() and not engine.has_work


def test_an_example_beyond_the_positions_of_the_model_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "short", max_positions=64)
    engine = make_engine(folder, scheduler={"max_model_len": 64})
    with pytest.raises(ValueError, match="65 tokens exceeds the model's 64 positions"):
        engine.add_job("ftjob-1", JOB, LORA, dataset_of([5] * 65, [1] * 65, [0, 65]))
    packed = dataset_of([5] * 120, [1] * 120, [0, 60, 120])
    engine.add_job("ftjob-2", JOB, LORA, packed)  # positions start again with each example
    assert any(event.finished for event in run(engine)[1])


def spoiled_dataset(**changes: np.ndarray | None) -> bytes:
    tensors: dict[str, Any] = {
        "tokens": np.arange(6, dtype=np.int32),
        "mask": np.ones(6, np.uint8),
        "offsets": np.array([0, 2, 6], np.int64),
        **changes,
    }
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x04nothing", "cannot be read"),
        (spoiled_dataset(mask=None), "'mask'"),
        (spoiled_dataset(mask=np.ones(5, np.uint8)), "mask"),
        (spoiled_dataset(offsets=np.array([0], np.int64)), "offsets"),
        (spoiled_dataset(offsets=np.array([0, 9], np.int64)), "offsets"),
        (spoiled_dataset(offsets=np.array([-2, 2, 6], np.int64)), "offsets"),
        (spoiled_dataset(offsets=np.array([0, 4, 2, 6], np.int64)), "two tokens"),
        (spoiled_dataset(offsets=np.array([0, 1, 6], np.int64)), "two tokens"),
        (spoiled_dataset(tokens=np.ones(6, np.float32)), "float32"),
        (spoiled_dataset(tokens=np.ones((6, 1), np.int32)), "one dimension"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_dataset_is_refused_with_words(data: bytes, words: str) -> None:
    with pytest.raises(InvalidDataset, match=words):
        Dataset.from_bytes(data)


def test_a_dataset_is_read_as_it_was_written() -> None:
    dataset = Dataset.from_bytes(spoiled_dataset(mask=np.array([1, 1, 1, 0, 1, 0], np.uint8)))
    tokens, labels = dataset.example(1)
    assert tokens.tolist() == [2, 3, 4, 5] and labels.tolist() == [-100, 4, -100, -100]
    assert dataset.lengths() == [2, 4] and dataset.num_targets() == [1, 1]


def change_state(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    return {**files, "state.json": json.dumps({**json.loads(files["state.json"]), **changes}).encode()}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda files: change_state(files, job_id="ftjob-2"), "ftjob-2"),
        (lambda files: change_state(files, config={}), "hyper-parameters"),
        (lambda files: {**files, "state.json": b"{"}, "state.json"),
        (lambda files: {"state.json": files["state.json"]}, "optimizer.safetensors"),
        (lambda files: {**files, "optimizer.safetensors": b"\0" * 40}, "optimizer.safetensors"),
        (
            lambda files: {**files, "optimizer.safetensors": save({"masters": np.ones(3, np.float32)})},
            "masters",
        ),
        (lambda files: {**files, "optimizer.safetensors": save({"other": np.ones(3, np.float32)})}, "other"),
    ],
    ids=["another job", "other settings", "no json", "missing", "damaged", "too small", "unknown"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_words(
    folder: Path, spoil: Callable[[dict[str, bytes]], dict[str, bytes]], words: str
) -> None:
    engine = make_engine(folder)
    dataset = make_dataset([20, 30], engine.model.config.vocab_size)
    engine.add_job("ftjob-1", JOB, LORA, dataset)
    run(engine)
    files = engine.checkpoint_job("ftjob-1")
    other = make_engine(folder)
    with pytest.raises(InvalidCheckpoint, match=words):
        other.add_job("ftjob-1", JOB, LORA, dataset, checkpoint=spoil(files))
    assert other.can_add_job() and not other.has_work
