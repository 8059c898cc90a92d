"""Memory for a tenth of the load: everybody waits longer, and nobody gets anything else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.gpu_worker.engine.batch import Batch
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import JobEvent
from services.gpu_worker.engine.in_flight import InFlight
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.engine.slo import SLO
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import Output, make_timeless_engine, prompt_of, tokens_of
from tests.gpu_worker.training import make_dataset

TIERS = ("priority", "default", "flex")
SLOS = {tier: SLO(1e6, 1e6, rank) for rank, tier in enumerate(TIERS)}  # a busy machine must not decide
BLOCK_SIZE, BUDGET = 4, 32  # tokens, of a block and of an iteration
NUM_REQUESTS, NUM_SHARED, NUM_GENERATED = 30, 48, 24
LOAD = sum(NUM_SHARED + number + NUM_GENERATED for number in range(1, NUM_REQUESTS + 1))  # tokens
EXAMPLES = [64, 20, 47, 33, 60, 12]
JOB = JobConfig(n_epochs=4, batch_size=3, learning_rate=0.01, seed=3)
NUM_STEPS = 8


@dataclass
class Life:
    """An engine's, from the first request to the end of the last request and of the job."""

    engine: Engine
    outputs: list[Output] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    num_finished_jobs: int = 0
    num_parked: int = 0

    def live(self) -> None:
        """Five requests come in every third iteration, the first beside the job's first windows."""
        self._count_parked()
        iteration = 0
        while len(self.outputs) < NUM_REQUESTS or self.engine.has_work:
            if iteration % 3 == 0:
                for _ in range(min(5, NUM_REQUESTS - len(self.outputs))):
                    self._add(len(self.outputs))
            self._step()
            iteration += 1

    def _count_parked(self) -> None:
        launch = self.engine.runner.launch

        def counted(batch: Batch) -> InFlight:
            self.num_parked += len(batch.parked)
            return launch(batch)

        self.engine.runner.launch = counted  # type: ignore[method-assign]

    def _add(self, number: int) -> None:
        """One of three texts, and what is the request's own."""
        shared = prompt_of(self.engine, NUM_SHARED, seed=number % 3)
        own = prompt_of(self.engine, number + 1, seed=10 + number)
        sampling = Sampling(max_tokens=NUM_GENERATED, temperature=number % 2, seed=number)
        self.engine.add(str(number), shared + own, sampling, tier=TIERS[number // 2 % len(TIERS)])
        self.outputs.append(Output())

    def _step(self) -> None:
        result = self.engine.step()
        self.engine.blocks.check_integrity()
        assert result.stats.num_decode_tokens + result.stats.num_prefill_tokens <= BUDGET
        for event in result.tokens:
            self.outputs[int(event.request_id)].add(event)
        for job in result.jobs:
            self._note(job)

    def _note(self, event: JobEvent) -> None:
        assert event.error is None
        self.num_finished_jobs += event.finished
        if event.report is not None and event.report.train_loss is not None:
            self.losses.append(event.report.train_loss)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tied=False)


def live(folder: Path, num_blocks: int) -> Life:
    engine = make_timeless_engine(
        folder,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        slos=SLOS,
        finetune_tokens_in_flight=max(EXAMPLES),
        scheduler={"max_model_len": 104, "max_num_batched_tokens": BUDGET, "max_num_seqs": NUM_REQUESTS},
    )
    examples = make_dataset(EXAMPLES, engine.model.config.vocab_size)
    engine.add_job("ftjob-1", JOB, LoraConfig(4, 8.0, ("q_proj", "v_proj", "down_proj")), examples)
    life = Life(engine)
    life.live()
    return life


def test_with_memory_for_a_tenth_of_the_load_all_end_as_if_there_were_room_for_all(folder: Path) -> None:
    """Prompts are longer than what an iteration computes and a third of them begin alike; requests take the job's
    blocks and each other's."""
    roomy, pressed = live(folder, LOAD // BLOCK_SIZE), live(folder, LOAD // 10 // BLOCK_SIZE)
    assert roomy.engine.scheduler.num_preempted == roomy.num_parked == 0
    assert pressed.engine.scheduler.num_preempted > 0 and pressed.num_parked > 0
    for life in (roomy, pressed):
        assert {output.finish for output in life.outputs} == {"length"}
        assert {len(output.tokens) for output in life.outputs} == {NUM_GENERATED}
        assert sum(output.cached_tokens for output in life.outputs) > 0
        assert life.num_finished_jobs == 1 and len(life.losses) == NUM_STEPS
        assert life.engine.blocks.num_free_blocks == life.engine.blocks.num_blocks
    assert tokens_of(pressed.outputs) == tokens_of(roomy.outputs)
    assert pressed.losses == pytest.approx(roomy.losses, abs=1e-5)
