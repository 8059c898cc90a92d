"""Whole lives of an engine, drawn at random: whatever happens around a request, its tokens are its own."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.events import StepResult
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import generate, make_adapter, make_engine, prompt_of
from tests.gpu_worker.training import make_dataset

ADAPTERS = (None, "a" * 64, "b" * 64)
NUM_STEPS = 250


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: str | None


@dataclass
class Life:
    """Adds, aborts and removes at random, and remembers what came out."""

    engine: Engine
    rng: random.Random
    running: dict[str, tuple[Request, list[int]]] = field(default_factory=dict)
    finished: list[tuple[Request, list[int]]] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    num_added: int = 0

    def live(self) -> None:
        for _ in range(NUM_STEPS):
            self.act()
            self.step()
        for job_id in self.jobs:
            self.engine.remove_job(job_id)
        while self.engine.has_work:
            self.step()

    def act(self) -> None:
        chance = self.rng.random()
        if chance < 0.25 and len(self.running) < 8:
            self.add()
        elif chance < 0.28 and self.running:
            request_id = self.rng.choice(list(self.running))
            self.engine.abort(request_id)
            del self.running[request_id]
        elif chance < 0.32 and self.engine.can_add_job():
            self.add_job()
        elif chance < 0.34 and self.jobs:
            self.engine.remove_job(self.jobs.pop(self.rng.randrange(len(self.jobs))))

    def add(self) -> None:
        """Prompts are beginnings of a few texts, so that they share prefixes."""
        text = prompt_of(self.engine, 60, seed=self.rng.randrange(3))
        sampling = Sampling(
            max_tokens=self.rng.randint(1, 20),
            temperature=self.rng.choice([0.0, 1.0]),
            seed=self.rng.randrange(5),
            stop_token_ids=frozenset(self.rng.sample(range(300), 5)),
        )
        request = Request(tuple(text[: self.rng.randint(1, 60)]), sampling, self.rng.choice(ADAPTERS))
        self.num_added += 1
        request_id = f"r{self.num_added}"
        self.engine.add(request_id, list(request.prompt), sampling, adapter=request.adapter)
        self.running[request_id] = request, []

    def add_job(self) -> None:
        self.num_added += 1
        lengths = [self.rng.randint(4, 50) for _ in range(4)]
        self.jobs.append(f"ftjob-{self.num_added}")
        dataset = make_dataset(lengths, self.engine.model.config.vocab_size, seed=self.num_added)
        config = JobConfig(n_epochs=20, batch_size=self.rng.randint(1, 3), learning_rate=0.01)
        self.engine.add_job(self.jobs[-1], config, LoraConfig(4, 8.0, ("q_proj", "down_proj")), dataset)

    def step(self) -> None:
        result: StepResult = self.engine.step()
        self.engine.blocks.check_integrity()
        for event in result.tokens:
            tokens = self.running[event.request_id][1]
            if event.token is not None:
                tokens.append(event.token)
            if event.finish is not None:
                self.finished.append(self.running.pop(event.request_id))
        assert not [event for event in result.jobs if event.error is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen3", tied=False)


def make_loaded_engine(folder: Path, **options: int) -> Engine:
    scheduler = {"max_model_len": 80, "max_num_seqs": 5, "max_num_batched_tokens": options.pop("budget", 64)}
    engine = make_engine(folder, scheduler=scheduler, max_adapters=2, finetune_tokens_in_flight=60, **options)
    for digest in ADAPTERS[1:]:
        assert digest is not None
        engine.load_adapter(digest, make_adapter(engine.model.config, seed=ord(digest[0])))
    return engine


@pytest.mark.parametrize("seed", range(6))
def test_requests_end_with_their_own_tokens_whatever_happens_around_them(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    num_blocks = rng.choice([21, 30, 60])
    engine = make_loaded_engine(folder, num_blocks=num_blocks, budget=rng.choice([5, 17, 64]))
    life = Life(engine, rng)
    life.live()
    assert not life.running and len(life.finished) > 20
    assert engine.blocks.num_free_blocks == num_blocks
    assert not any(slot.pins for slot in engine.adapters._slots.values())
    quiet = make_loaded_engine(folder)
    for number, (request, tokens) in enumerate(life.finished):
        alone = generate(
            quiet, list(request.prompt), request.sampling, adapter=request.adapter, cache_salt=str(number)
        )
        assert tokens == alone.tokens, request
