"""Jobs run within the memory that they were given, and are refused with words where they cannot."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from services.gpu_worker.compiler.programs import CompiledMethod
from services.gpu_worker.engine.admission import JobMustWait
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.latency import Curve, LatencyModel
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.memory import JobMemory, JobPlanner, Room, TooLarge
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.finetune.trainer import examples_of
from services.gpu_worker.model.peft import BottleneckConfig, LoraConfig, Method, PrefixConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import make_engine, make_timeless_engine, run
from tests.gpu_worker.training import advance, make_dataset, make_trainer, make_transformer

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(4, 8.0, ALL)
METHODS: dict[str, Method] = {
    "lora": LORA,
    "bottleneck": BottleneckConfig(8, ("o_proj", "down_proj"), "gelu", 1.0),
    "prefix": PrefixConfig(6),
}
LENGTHS = [70, 12, 50, 8, 33, 64]
JOB = JobConfig(n_epochs=2, batch_size=3, learning_rate=0.01, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tied=False, num_layers=3)


def add_job(engine: Engine, job_id: str = "ftjob-1", method: Method = LORA, **options: Any) -> None:
    dataset = make_dataset(LENGTHS, engine.model.config.vocab_size)
    engine.add_job(job_id, JOB, method, dataset, **options)


# --- admission


def needed(folder: Path, activation_bytes: int) -> JobMemory:
    """By a job that keeps so much, where that is possible."""
    engine = make_engine(folder, activation_bytes=activation_bytes)
    add_job(engine)
    return engine.admission.plan_of("ftjob-1").memory


def test_a_job_keeps_as_much_as_its_part_allows(folder: Path) -> None:
    leanest, richest = needed(folder, 1), needed(folder, 1 << 40)
    assert leanest.activations < richest.activations / 5
    kept = []
    for share in (0.0, 0.3, 0.6, 1.0):
        wanted = leanest.device_bytes + share * (richest.device_bytes - leanest.device_bytes)
        engine = make_engine(folder, finetune_bytes=int(wanted) + 1, max_finetune_jobs=1)
        add_job(engine)
        plan = engine.admission.plan_of("ftjob-1").memory
        assert plan.device_bytes <= wanted + 1
        kept.append(plan.activations)
    assert kept == sorted(set(kept)) and (kept[0], kept[-1]) == (leanest.activations, richest.activations)


def test_a_job_keeps_more_than_its_part_where_the_service_level_has_no_time_for_leaner_steps(
    folder: Path,
) -> None:
    """What decodes leave of the time between tokens decides; without any left, bytes would not help."""
    kept = []
    lean, rich = needed(folder, 1), needed(folder, 1 << 40)
    for slack in ("none", "some", "any"):
        engine = make_engine(folder, finetune_bytes=2 * rich.device_bytes, max_finetune_jobs=1)
        engine.admission.max_jobs = 2 * rich.device_bytes // (lean.device_bytes + 1)  # a lean job's part
        compiled = engine.admission.compile(LORA)
        leanest = LayerPolicies.uniform(compiled, compiled.policies[-1])
        least_ms, most_ms = (policy / 1e6 for policy in (compiled.backward_flops, leanest.step_flops))
        curve = Curve([0, 32], [0.0, most_ms])
        slack_ms = {"none": 0.0, "some": (least_ms + most_ms) / 2, "any": 2 * most_ms}[slack]
        engine.admission.set_pace(leanest, LatencyModel(curve, curve, curve, curve, curve), 32, slack_ms)
        add_job(engine)
        kept.append(engine.admission.plan_of("ftjob-1").memory.activations)
    assert kept[0] == kept[2] == lean.activations < kept[1] < rich.activations


def test_the_time_between_tokens_reaches_the_choice_of_what_is_kept(folder: Path) -> None:
    levels = [{DEFAULT_TIER: SLO(limit, 10_000.0)} for limit in (0.001, 1_000.0, 100_000.0)]
    paces = [make_engine(folder, slos=slos).admission.step_flops for slos in levels]
    assert paces[0] == 0 < paces[1] < paces[2]


def test_jobs_share_what_there_is(folder: Path) -> None:
    """Equal parts where that is enough; a large job gets more, and the next makes do with the rest."""
    lean, rich = needed(folder, 1).device_bytes, needed(folder, 1 << 40).device_bytes
    engine = make_engine(folder, finetune_bytes=2 * rich + 2, max_finetune_jobs=2)
    for job_id in ("ftjob-1", "ftjob-2"):
        add_job(engine, job_id)
        assert engine.admission.plan_of(job_id).memory.device_bytes == rich
    engine = make_engine(folder, finetune_bytes=lean + rich, max_finetune_jobs=4)
    add_job(engine, "ftjob-1")
    assert lean <= engine.admission.plan_of("ftjob-1").memory.device_bytes < rich


def test_where_not_even_the_leanest_fits_sequences_become_shorter(folder: Path) -> None:
    lean = needed(folder, 1)
    engine = make_engine(
        folder, finetune_bytes=lean.device_bytes - lean.activations // 8, max_finetune_jobs=1
    )
    add_job(engine)
    plan = engine.admission.plan_of("ftjob-1")
    assert max(LENGTHS) <= plan.max_tokens < sum(sorted(LENGTHS)[-3:])
    assert engine.job("ftjob-1").max_tokens_in_flight == plan.max_tokens
    assert any(event.finished for event in run(engine)[1])


def test_a_job_that_never_fits_is_refused_with_what_it_needs(folder: Path) -> None:
    engine = make_engine(folder, finetune_bytes=300_000)
    with pytest.raises(
        TooLarge, match=r"at least 0\.\d MiB \(0\.3 MiB for parameters.* activations.*finetune_bytes"
    ):
        add_job(engine)
    assert engine.can_add_job() and not engine.has_work
    add_job(engine, method=PrefixConfig(2))
    assert engine.has_work


def test_a_job_that_does_not_fit_beside_others_waits_for_one_to_end(folder: Path) -> None:
    lean = needed(folder, 1).device_bytes
    engine = make_engine(folder, finetune_bytes=int(1.3 * lean))
    add_job(engine, "ftjob-1")
    with pytest.raises(JobMustWait, match="1 jobs leave"):
        add_job(engine, "ftjob-2")
    assert not engine.can_add_job()
    engine.remove_job("ftjob-1")
    assert engine.can_add_job()
    add_job(engine, "ftjob-2")


# --- host memory


@pytest.mark.parametrize("method", METHODS)
def test_activations_in_host_memory_change_no_bit(folder: Path, method: str) -> None:
    exports = []
    for offload in ("never", "always"):
        engine = make_timeless_engine(folder, offload_activations=offload, activation_bytes=100_000)
        add_job(engine, method=METHODS[method])
        run(engine)
        account = engine.memory()
        assert (account.host["activations"] > 0) == (offload == "always")
        exports.append(engine.export_job("ftjob-1", "tiny"))
    assert exports[0] == exports[1]


def test_only_as_many_layers_leave_the_device_as_have_no_room(tmp_path: Path) -> None:
    """The lowest ones; counted apart from what is on the device, where two layers are on their way."""
    model = make_transformer(make_tiny_model(tmp_path / "deep", tied=False, num_layers=5))
    dataset = make_dataset([70], model.config.vocab_size)
    examples, config = examples_of(dataset, LORA), JobConfig(batch_size=1)
    compiled = CompiledMethod(model.config, LORA, dtype=torch.float32, sequence_length=70)
    planner = JobPlanner(model.weights, compiled, config, examples, None)
    lean = planner.plan(70, Room(aim=0, most=1 << 40)).memory
    per_layer = 70 * model.config.hidden_size * 4
    for num_layers in (3, 4, 5):
        most = lean.device_bytes - (num_layers - 2) * per_layer
        plan = planner.plan(70, Room(aim=0, most=most, host=1 << 40, moves="at need"))
        assert plan.num_host_layers == num_layers
        assert plan.memory.device_bytes == most
        assert plan.memory.host_activations == num_layers * per_layer
        with pytest.raises(TooLarge):
            planner.plan(70, Room(aim=0, most=most, host=1 << 40))
        with pytest.raises(TooLarge):
            planner.plan(70, Room(aim=0, most=most, host=per_layer // 2, moves="at need"))


def gradient_of(folder: Path, num_host_layers: int, moves_at: int) -> torch.Tensor:
    """Of one step, in which the `moves_at`-th window finds that all activations have moved to host memory."""
    dataset = make_dataset(LENGTHS, 384)
    trainer = make_trainer(
        make_transformer(folder), dataset, method=LORA, policy=0, num_host_layers=num_host_layers
    )
    numbers = count(1)

    def size() -> int:
        if next(numbers) == moves_at:
            trainer.move_to_host()
        return 16

    advance(trainer, size)
    assert next(numbers) > moves_at
    memory = trainer.memory
    all_on_host = moves_at or num_host_layers == 3
    assert (memory.host_activations > memory.activations) == bool(all_on_host)
    return trainer.parameters.grad


@pytest.mark.parametrize("num_host_layers", [0, 1, 3])
@pytest.mark.parametrize("moves_at", [0, 5, 20, 40], ids=lambda n: f"window {n}")
def test_what_moves_to_host_memory_on_the_way_is_the_same(
    folder: Path, num_host_layers: int, moves_at: int
) -> None:
    assert torch.equal(gradient_of(folder, num_host_layers, moves_at), gradient_of(folder, 0, 0))
