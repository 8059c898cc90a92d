"""Two and four ranks that share a model serve and train as one process does."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import JobEvent
from services.gpu_worker.engine.group import GroupEngine
from services.gpu_worker.engine.requests import InvalidRequest
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.config import UnsupportedModel
from services.gpu_worker.model.peft import InvalidAdapter, Method
from services.gpu_worker.ranks import open_engine
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import METHODS, Output, make_adapter, make_config, make_engine, prompt_of, run
from tests.gpu_worker.training import make_dataset

# AdamW moves by the sign of a gradient that is nothing but rounding, unless its epsilon is larger than that
PLAIN = JobConfig(batch_size=4, n_epochs=3, learning_rate=2e-3, epsilon=1e-4, seed=3)
JOB = replace(PLAIN, max_grad_norm=0.5)
LENGTHS = [40, 33, 21, 60]
TOLERANCE = 1e-5
two = pytest.mark.parametrize("ranks", [2], indirect=True, ids=["2 ranks"])
four = pytest.mark.parametrize("ranks", [4], indirect=True, ids=["4 ranks"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases of q, k and v, and a head of its own."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_model(path, "qwen2", num_heads=8, num_kv_heads=4, tied=False)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Engine:
    return loaded(make_engine(folder))


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(folder: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """With two ranks next to nothing of a layer is kept for the backward, with four everything."""
    torch.set_num_threads(1)
    kept = {2: 1, 4: 1 << 30}[request.param]
    with open_engine(make_config(folder, activation_bytes=kept, num_threads=1), request.param) as engine:
        yield loaded(engine)
    assert not multiprocessing.active_children()


def loaded(engine: Engine) -> Engine:
    for seed, (name, method) in enumerate(METHODS.items()):
        engine.load_adapter(name, make_adapter(engine.model.weights.whole, method, seed=seed))
    return engine


def add_requests(engine: Engine, how: Sampling) -> list[str]:
    """One for the base model and for each adapter, of different lengths."""
    names = [None, *METHODS]
    for number, adapter in enumerate(names):
        engine.add(f"r{number}", prompt_of(engine, 20 + 5 * number, number), how, adapter=adapter)
    return [f"r{number}" for number in range(len(names))]


def serve(engine: Engine, how: Sampling) -> list[Output]:
    names = add_requests(engine, how)
    outputs, _ = run(engine, *names)
    return [outputs[name] for name in names]


def randomised(engine: Engine, job_id: str, method: Method) -> dict[str, bytes]:
    """A checkpoint before the first step in which no parameter stands where its gradient is zero."""
    add_job(engine, job_id, method)
    parameters = engine.runner.trainers[job_id].parameters
    generator = torch.Generator().manual_seed(1)
    parameters.flat.add_(torch.randn(parameters.flat.shape, generator=generator) * 0.1)
    files = engine.checkpoint_job(job_id)
    engine.remove_job(job_id)
    return files


def add_job(engine: Engine, job_id: str, method: Method, config: JobConfig = JOB, **options: Any) -> None:
    dataset = make_dataset(LENGTHS, engine.model.config.vocab_size)
    engine.add_job(job_id, config, method, dataset, **options)


def first_step(engine: Engine, job_id: str) -> list[JobEvent]:
    events: list[JobEvent] = []
    while engine.job(job_id).step < 1:
        events += engine.step().jobs
    return events


def curve(events: list[JobEvent]) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    assert not [event.error for event in events if event.error is not None]
    reports = [event.report for event in events if event.report is not None]
    return [
        (r.train_loss, r.grad_norm) for r in reports if r.train_loss is not None and r.grad_norm is not None
    ]


def gradients(alone: Engine, job_id: str, files: dict[str, bytes]) -> dict[Any, Tensor]:
    """By parameter: after one step AdamW's first moment is a multiple of the gradient."""
    moment = load(files["optimizer.safetensors"])["exp_avg"]
    return alone.runner.trainers[job_id].parameters.weights.shards.by_place(moment)


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-6))


def assert_same_training(engine: Engine, alone: Engine, name: str, config: JobConfig = JOB) -> None:
    """The gradient of the first step, the curve of all, and the adapter at the end."""
    start = randomised(alone, name, METHODS[name]) if config is JOB else None
    found = []
    for one in (engine, alone):
        add_job(one, name, METHODS[name], config, checkpoint=start)
        events = first_step(one, name)
        found.append((events, one.checkpoint_job(name)))
    theirs = gradients(alone, name, found[1][1])
    for place, ours in gradients(alone, name, found[0][1]).items():
        assert error(ours, theirs[place]) < TOLERANCE, place
    curves = [curve(events + run(one)[1]) for one, (events, _) in zip((engine, alone), found, strict=True)]
    assert len(curves[1]) == config.n_epochs
    for ours_step, theirs_step in zip(*curves, strict=True):
        assert ours_step == pytest.approx(theirs_step, rel=TOLERANCE)
    tensors = [load(one.export_job(name, "tiny")["adapter_model.safetensors"]) for one in (engine, alone)]
    assert tensors[0].keys() == tensors[1].keys()
    for key, tensor in tensors[1].items():
        assert torch.allclose(tensors[0][key], tensor, atol=1e-5), key
    for one in (engine, alone):
        one.remove_job(name)


def test_a_batch_of_every_kind_of_adapter_gets_the_same_tokens(ranks: Engine, alone: Engine) -> None:
    how = Sampling(max_tokens=12, logprobs=2)
    theirs = serve(alone, how)
    for ours, expected in zip(serve(ranks, how), theirs, strict=True):
        assert ours.tokens == expected.tokens
        assert [p.logprob for p in ours.logprobs] == pytest.approx(
            [p.logprob for p in expected.logprobs], abs=1e-4
        )
    assert len({tuple(output.tokens) for output in theirs}) == len(METHODS) + 1


def test_random_draws_are_the_same(ranks: Engine, alone: Engine) -> None:
    how = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, seed=5)
    assert [o.tokens for o in serve(ranks, how)] == [o.tokens for o in serve(alone, how)]


@two
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_train_every_method_as_one_process_does(ranks: Engine, alone: Engine, name: str) -> None:
    assert_same_training(ranks, alone, name)


@four
@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_four_ranks_train_as_one_process_does(ranks: Engine, alone: Engine, name: str) -> None:
    assert_same_training(ranks, alone, name)


@two
def test_the_ranks_drop_what_one_process_would(ranks: Engine, alone: Engine) -> None:
    dropping = replace(PLAIN, lora_dropout=0.3)
    assert_same_training(ranks, alone, "lora", dropping)


@two
def test_one_process_takes_up_a_job_where_two_ranks_left_it(ranks: Engine, alone: Engine) -> None:
    add_job(ranks, "lora", METHODS["lora"])
    first_step(ranks, "lora")
    add_job(alone, "lora", METHODS["lora"], checkpoint=ranks.checkpoint_job("lora"))
    ours, theirs = (curve(run(engine)[1]) for engine in (alone, ranks))
    assert len(ours) == JOB.n_epochs - 1
    for ours_step, theirs_step in zip(ours, theirs, strict=True):
        assert ours_step == pytest.approx(theirs_step, rel=TOLERANCE)
    for engine in (alone, ranks):
        engine.remove_job("lora")


@four
def test_jobs_beside_requests_change_neither(ranks: Engine, alone: Engine) -> None:
    how = Sampling(max_tokens=8)
    expected = [output.tokens for output in serve(alone, how)]
    jobs = ("lora", "ia3")
    for name in jobs:
        add_job(ranks, name, METHODS[name])
        add_job(alone, name, METHODS[name])
    names = add_requests(ranks, how)
    outputs, events = run(ranks, *names)
    events += run(ranks)[1]
    beside = run(alone)[1]
    assert [outputs[name].tokens for name in names] == expected
    for name in jobs:
        ours, theirs = (curve([e for e in some if e.job_id == name]) for some in (events, beside))
        assert len(ours) == JOB.n_epochs
        for ours_step, theirs_step in zip(ours, theirs, strict=True):
            assert ours_step == pytest.approx(theirs_step, rel=TOLERANCE)
        ranks.remove_job(name)
        alone.remove_job(name)


def test_what_is_refused_is_refused_by_every_rank(ranks: Engine) -> None:
    with pytest.raises(InvalidRequest, match="is not loaded"):
        ranks.add("r", [5], Sampling(max_tokens=1), adapter="nobody's")
    files = make_adapter(ranks.model.config, METHODS["lora"])  # of a rank's shapes, not of the model's
    with pytest.raises(InvalidAdapter, match="expected"):
        ranks.load_adapter("narrow", files)
    ranks.add("r", [5], Sampling(max_tokens=2))
    ranks.step()
    ranks.abort("r")
    ranks.abort("nobody's")
    assert len(serve(ranks, Sampling(max_tokens=2))) == len(METHODS) + 1


def test_a_rank_holds_its_part_of_everything_that_is_divided(ranks: Engine, alone: Engine) -> None:
    size = ranks.group.size
    ours, theirs = ranks.model.weights, alone.model.weights
    for name in ("qkv", "o", "gate_up", "down"):
        assert ours.layers[0].linear(name).size_bytes * size == theirs.layers[0].linear(name).size_bytes
    assert ours.embedding.shape == theirs.embedding.shape
    assert ranks.cache.num_kv_heads * size == alone.cache.num_kv_heads
    assert ranks.adapters.get("prefix").size_bytes * size == alone.adapters.get("prefix").size_bytes
    assert ranks.adapters.get("lora").size_bytes < alone.adapters.get("lora").size_bytes


def test_every_call_that_changes_an_engine_reaches_every_rank() -> None:
    reads = {"has_work", "can_add_job", "job", "trained_tokens", "memory"}
    public = {name for name in vars(Engine) if not name.startswith("_")}
    assert public - reads <= set(vars(GroupEngine))


@pytest.mark.parametrize(
    ("tp", "device", "message"),
    [
        (3, "cpu", "3 ranks: they cannot share 4 key/value heads evenly"),
        (8, "cpu", "8 ranks: they cannot share 4 key/value heads evenly"),
        (0, "cpu", "at least one is needed"),
        (2, "cuda:1", "'cuda:1' is one GPU"),
    ],
)
def test_a_group_that_cannot_be_is_refused(folder: Path, tp: int, device: str, message: str) -> None:
    refused = UnsupportedModel if device == "cpu" else ValueError
    with pytest.raises(refused, match=message), open_engine(make_config(folder, device=device), tp):
        pass


DEATH = """
import multiprocessing, sys, time
from pathlib import Path
from services.gpu_worker.ranks import open_engine
from shared.telemetry import configure_logs
from tests.gpu_worker.engines import make_config
if __name__ == "__main__":
    configure_logs()
    with open_engine(make_config(Path(sys.argv[1]), num_threads=1), 2):
        (follower,) = multiprocessing.active_children()
        follower.kill()
        time.sleep(60)
"""


def test_the_death_of_one_rank_ends_all_with_its_name(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "death.py"
    script.write_text(DEATH)
    ended = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, timeout=60, env={"PYTHONPATH": "."}
    )
    assert ended.returncode == 1
    assert '"rank": "rank 1", "exit_code": -9, "event": "rank_died"' in ended.stderr
