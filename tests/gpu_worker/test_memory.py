"""Whose the memory is: the account against the tensors that there are, and who gives some up when it is short."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.api.metrics import Metrics
from services.gpu_worker.dry_window import window_bytes
from services.gpu_worker.engine.batch import Batch
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.in_flight import InFlight
from services.gpu_worker.engine.memory import container_bytes, free_bytes, total_bytes
from services.gpu_worker.engine.memory_watch import INTERVAL_S
from services.gpu_worker.engine.pressure import Pressure
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig, Phase
from services.gpu_worker.finetune.packing import filled
from services.gpu_worker.model.peft import (
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
)
from services.gpu_worker.model.weights import load_weights
from services.gpu_worker.plan import Request
from services.gpu_worker.planner import Planner
from shared.messages import WorkerStatus
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import (
    Output,
    generate,
    make_adapter,
    make_engine,
    make_timeless_engine,
    prompt_of,
    run,
    tokens_of,
)
from tests.gpu_worker.training import make_dataset

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(4, 8.0, ALL)
METHODS: dict[str, Method] = {
    "lora": LORA,
    "dora": LoraConfig(4, 8.0, ("q_proj", "v_proj", "down_proj"), dora=True),
    "bottleneck": BottleneckConfig(8, ("o_proj", "down_proj"), "gelu", 1.0),
    "prefix": PrefixConfig(6),
}
MORE_METHODS = METHODS | {
    "ia3": Ia3Config(ALL, ("o_proj", "down_proj")),
    "prompt": PromptConfig(5),
    "lora-vocabulary": LoraConfig(4, 8.0, ("q_proj", "embed_tokens", "lm_head")),
}
LENGTHS = [70, 12, 50, 8, 33, 64]
JOB = JobConfig(n_epochs=2, batch_size=3, learning_rate=0.01, seed=5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tied=False, num_layers=3)


def make_slow_engine(folder: Path, **options: Any) -> Engine:
    """An iteration has time for one window of a job at most."""
    return make_engine(folder, scheduler={"idle_ms": 1e-6}, **options)


def add_job(
    engine: Engine, job_id: str = "ftjob-1", method: Method = LORA, config: JobConfig = JOB, **options: Any
) -> None:
    dataset = make_dataset(LENGTHS, engine.model.config.vocab_size)
    engine.add_job(job_id, config, method, dataset, **options)


def step_into_backward(engine: Engine, step: int = 1) -> None:
    """Until a job has done optimizer steps and all its activations wait for the backward of the next."""
    job = engine.job("ftjob-1")
    for _ in range(1000):
        engine.step()
        if job.step >= step and job.phase is Phase.BACKWARD:
            return
    raise AssertionError("it never came to that")


def storages() -> dict[int, torch.UntypedStorage]:
    """Of all tensors alive in this process, by address."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage for storage in found}


# --- the account


@pytest.mark.parametrize("method", METHODS)
def test_the_account_is_the_sum_of_the_tensors(folder: Path, method: str) -> None:
    before = storages()
    engine = make_slow_engine(folder, num_blocks=64)
    engine.load_adapter("a" * 64, make_adapter(engine.model.config, METHODS[method]))
    add_job(engine, method=METHODS[method])
    step_into_backward(engine)
    held = sum(storage.nbytes() for address, storage in storages().items() if address not in before)
    account = engine.memory()
    assert account.total == pytest.approx(held, rel=1e-4)
    assert min(account.device.values()) > 0 and set(account.host.values()) == {0}


def test_a_loaded_model_does_not_keep_its_file_mapped(folder: Path) -> None:
    """Its pages would be resident beside the weights made from them."""
    weights = load_weights(folder, torch.float32, CPU)
    assert weights.size_bytes and str(folder) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("offload", ["never", "always"])
@pytest.mark.parametrize("method", MORE_METHODS)
def test_what_is_held_is_what_was_planned(folder: Path, method: str, offload: str) -> None:
    engine = make_slow_engine(folder, finetune_tokens_in_flight=512, offload_activations=offload)
    serving = engine.memory().total
    add_job(engine, method=MORE_METHODS[method], config=JobConfig(n_epochs=2, batch_size=6))
    planned = engine.admission.plan_of("ftjob-1").memory
    step_into_backward(engine)
    held = engine.runner.trainers["ftjob-1"].memory
    for owner in ("trainable", "gradients", "optimizer", "activations", "accumulators", "host_activations"):
        assert getattr(held, owner) == pytest.approx(getattr(planned, owner), rel=2e-3), owner
    assert 0.2 * planned.windows < held.windows <= planned.windows
    assert (held.host_activations > 0) == (offload == "always")
    assert planned.device_bytes <= engine.admission.budget // engine.config.max_finetune_jobs
    account = engine.memory()
    assert account.statistics == {"planned": serving + planned.device_bytes, "held": account.total}
    assert account.total <= account.planned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch counts what it allocates on a GPU only")
@pytest.mark.parametrize("offload", ["never", "always"])
def test_a_gpu_allocates_what_was_planned(tmp_path: Path, offload: str) -> None:
    """At most, over optimizer steps of one sequence: what a plan of the job counts, with what a window computes with,
    beside what was there when the engine was ready."""
    num_tokens, window = 4096, 512
    sizes = {"hidden_size": 1024, "num_heads": 8, "num_kv_heads": 2, "intermediate_size": 4096}
    folder = make_tiny_model(tmp_path / "wide", num_layers=8, max_positions=num_tokens, **sizes)
    engine = make_engine(
        folder,
        num_blocks=num_tokens,
        block_size=16,
        device="cuda",
        dtype="bfloat16",
        finetune_tokens_in_flight=num_tokens,
        offload_activations=offload,
        scheduler={"finetune_window": window, "idle_ms": 1e6},
    )
    ready = torch.cuda.memory_allocated()
    dataset = make_dataset([num_tokens], engine.model.config.vocab_size)
    engine.add_job("ftjob-1", JobConfig(n_epochs=2, batch_size=1), LORA, dataset)
    plan = engine.admission.plan_of("ftjob-1")
    work = window_bytes(plan.policies, "none", num_tokens, window)
    run(engine)
    pool = engine.memory().pool
    assert pool is not None and pool.reserved >= pool.peak
    most = ready + plan.memory.device_bytes + work.peak
    assert most - plan.memory.windows - work.peak < 1.02 * pool.peak < 1.02**2 * most


def test_metrics_account_and_plan_agree(folder: Path) -> None:
    """What Prometheus reads, what the engine counts, and what was planned before there was an engine."""
    engine = make_slow_engine(folder)
    add_job(engine, config=JobConfig(n_epochs=2, batch_size=6))
    step_into_backward(engine)
    account, metrics = engine.memory(), Metrics()
    metrics.set_memory(
        [
            WorkerStatus(
                worker_id="w",
                memory_bytes=account.device,
                memory_limit_bytes=account.limit,
                memory_statistics=account.statistics,
            )
        ]
    )
    for kind, num_bytes in account.statistics.items():
        labels = {"worker": "w", "kind": kind}
        assert metrics.registry.get_sample_value("flexllm_memory_statistics_bytes", labels) == num_bytes
    places = {"worker": "w", "place": "device"}
    exported = {
        owner: metrics.registry.get_sample_value("flexllm_memory_bytes", places | {"owner": owner}) or 0
        for owner in account.device
    }
    assert exported == account.device
    config = json.loads((folder / "config.json").read_text())
    num_tokens = filled(sum(LENGTHS), engine.config.finetune_tokens_in_flight, engine.admission.grain)
    request = Request("tiny", config, LORA, torch.float32, num_tokens, 32, budget_bytes=1 << 30)
    plan = Planner(request).plan()
    tables = 2 * engine.model.cos.nbytes
    planned = {
        "weights": plan.weights.bytes_by_form["none"] + tables,
        "kv_cache": plan.memory.kv_bytes_per_token * engine.cache.num_blocks * engine.cache.block_size,
        "trainable": plan.adapter.weight_bytes,
        "gradients": plan.adapter.gradient_bytes,
        "optimizer": plan.adapter.optimizer_bytes,
        "activations": plan.memory.activation_bytes,
        "accumulators": plan.memory.sequence.residual_gradient_bytes + plan.memory.sequence.kv_gradient_bytes,
    }
    for owner, num_bytes in planned.items():
        assert exported[owner] == pytest.approx(num_bytes, rel=0.02), owner
    assert account.limit == total_bytes(CPU) > account.total


def test_a_finished_job_leaves_nothing(folder: Path) -> None:
    engine = make_engine(folder)
    before = engine.memory()
    add_job(engine)
    run(engine)
    engine.remove_job("ftjob-1")
    assert engine.memory() == before


@pytest.mark.parametrize("files", ["version 1", "version 2"])
def test_the_container_limits_what_is_free(tmp_path: Path, files: str) -> None:
    (tmp_path / "memory").mkdir()
    names = {
        "version 1": ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
        "version 2": ("memory.max", "memory.current", "memory.stat"),
    }[files]
    limit, used, statistics = (tmp_path / name for name in names)
    limit.write_text("max\n")
    used.write_text("700\n")
    assert container_bytes(tmp_path) == []
    limit.write_text("1000\n")
    assert container_bytes(tmp_path) == [(1000, 700)]
    dropped = "total_inactive_file" if files == "version 1" else "inactive_file"
    statistics.write_text(f"anon 400\n{dropped} 250\n")
    assert container_bytes(tmp_path) == [(1000, 450)]
    assert free_bytes(CPU) <= total_bytes(CPU)


# --- pressure


def look(engine: Engine, free: str) -> Pressure:
    """A second later, on a device that lacks memory or has it."""
    gauge = engine._watch.gauge
    gauge.low, gauge.high = {"little": (1 << 62, 1 << 62), "some": (0, 1 << 62), "enough": (0, 0)}[free]
    engine._watch.look(engine._watch._looked_s + INTERVAL_S)
    return engine.scheduler.finetuning.pressure


def test_finetuning_yields_memory_step_by_step_and_takes_it_back(folder: Path) -> None:
    alone = make_slow_engine(folder)
    add_job(alone)
    run(alone)
    engine = make_slow_engine(folder)
    add_job(engine)
    step_into_backward(engine)
    trainer, job = engine.runner.trainers["ftjob-1"], engine.job("ftjob-1")
    for level in (Pressure.SMALL_WINDOWS, Pressure.ON_HOST):
        assert look(engine, "little") is level
        assert engine.step().stats.num_backward_tokens > 0
    assert look(engine, "little") is Pressure.PAUSED
    assert engine.step().stats.num_backward_tokens == 0 and job.blocks and trainer.memory.activations
    assert look(engine, "some") is Pressure.PAUSED
    assert look(engine, "little") is look(engine, "little") is Pressure.PREEMPTED
    assert trainer.memory.device_bytes == trainer.memory.parameters
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks and job.restarts == 1
    for level in reversed(Pressure):
        assert engine.scheduler.finetuning.pressure is level
        assert not job.blocks or level < Pressure.PAUSED
        engine.step()
        look(engine, "enough")
    run(engine)
    assert engine.export_job("ftjob-1", "tiny") == alone.export_job("ftjob-1", "tiny")


def test_requests_are_served_while_finetuning_has_no_memory(folder: Path) -> None:
    engine = make_engine(folder)
    expected = generate(engine, prompt_of(engine, 30), Sampling(max_tokens=8), cache_salt="before").tokens
    add_job(engine)
    for _ in range(4):
        look(engine, "little")
    assert generate(engine, prompt_of(engine, 30), Sampling(max_tokens=8)).tokens == expected
    assert engine.job("ftjob-1").served_tokens == 0


@dataclass
class Outcome:
    """What requests and jobs came to, and how often memory was short on the way."""

    tokens: list[list[int]]
    losses: dict[str, list[float]]
    num_parked: int = 0
    num_restarts: int = 0
    num_preempted: int = 0


def live(folder: Path, num_blocks: int, offload: str) -> Outcome:
    """Eighteen requests, some with an adapter, come three at a time into steps of two jobs of different methods."""
    engine = make_timeless_engine(
        folder, num_blocks=num_blocks, offload_activations=offload, scheduler={"max_model_len": 90}
    )
    engine.load_adapter("a" * 64, make_adapter(engine.model.config))
    for job_id, method in (("ftjob-1", "dora"), ("ftjob-2", "bottleneck")):
        add_job(engine, job_id, METHODS[method], replace(JOB, n_epochs=4))
    jobs = [engine.job("ftjob-1"), engine.job("ftjob-2")]
    found, outputs = Outcome([], {job.job_id: [] for job in jobs}), [Output() for _ in range(18)]
    launch = engine.runner.launch

    def counted(batch: Batch) -> InFlight:
        found.num_parked += len(batch.parked)
        return launch(batch)

    engine.runner.launch = counted  # type: ignore[method-assign]
    coming = list(range(len(outputs)))
    while coming or engine.has_work:
        idle = not engine.scheduler.running
        if idle and (any(job.reads_cache for job in jobs) or not engine.has_work):
            for index in [coming.pop(0) for _ in coming[:3]]:
                sampling = Sampling(max_tokens=30, temperature=index % 2, seed=index)
                adapter = "a" * 64 if index % 3 == 0 else None
                engine.add(str(index), prompt_of(engine, 30 + index, index), sampling, adapter=adapter)
        result = engine.step()
        engine.blocks.check_integrity()
        for event in result.tokens:
            outputs[int(event.request_id)].add(event)
        for job in result.jobs:
            assert job.error is None
            if job.report is not None and job.report.train_loss is not None:
                found.losses[job.job_id].append(job.report.train_loss)
    found.tokens, found.num_restarts = tokens_of(outputs), sum(job.restarts for job in jobs)
    found.num_preempted = engine.scheduler.num_preempted
    assert engine.blocks.num_free_blocks == num_blocks and engine.memory().host["kv_cache"] == 0
    return found


@pytest.mark.parametrize("offload", ["auto", "never"])
def test_with_blocks_for_a_part_of_the_load_all_end_as_if_there_were_room(folder: Path, offload: str) -> None:
    """Requests take the jobs' blocks first, whose keys and values wait in host memory or are computed again,
    and then each other's."""
    roomy, squeezed = live(folder, 400, offload), live(folder, 46, offload)
    assert (roomy.num_parked, roomy.num_restarts, roomy.num_preempted) == (0, 0, 0)
    assert squeezed.num_preempted > 0
    assert (squeezed.num_parked > 2, squeezed.num_restarts > 2) == (offload == "auto", offload == "never")
    assert squeezed.tokens == roomy.tokens and all(len(tokens) == 30 for tokens in roomy.tokens)
    for job_id, losses in roomy.losses.items():
        assert squeezed.losses[job_id] == pytest.approx(losses, abs=1e-4) and len(losses) == 8
