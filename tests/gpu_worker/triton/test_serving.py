"""An engine on Triton's kernels says the same as one on torch's: prompts, decodes, adapters and jobs in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.gpu_worker.engine.batch import Batch
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.in_flight import InFlight
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.kernels.backend import KernelChoice
from services.gpu_worker.model.peft import LoraConfig
from tests.gpu_worker.engines import METHODS, TARGETS, Output, make_adapter, make_engine, prompt_of, run
from tests.gpu_worker.training import make_dataset

LIMITS = {"max_model_len": 40, "max_num_batched_tokens": 24, "finetune_window": 12, "max_num_seqs": 6}
LORA = LoraConfig(4, 8.0, TARGETS)
ADAPTERS = {"first": LORA, "second": LoraConfig(2, 6.0, ("q_proj", "down_proj")), "scaled": METHODS["ia3"]}


def engine_of(folder: Path, device: torch.device, kernels: KernelChoice, **config: Any) -> Engine:
    engine = make_engine(
        folder, num_blocks=64, device=str(device), kernels=kernels, scheduler=LIMITS, lanes=False, **config
    )
    for seed, (name, method) in enumerate(ADAPTERS.items()):
        engine.load_adapter(name, make_adapter(engine.model.config, method, seed=seed))
    return engine


def serve(engine: Engine) -> tuple[dict[str, Output], list[float | None]]:
    """Prompts of several lengths for the base model and three adapters, cut into pieces, while a job trains; the
    answers, and the job's losses."""
    data = make_dataset([9, 6, 8], engine.model.config.vocab_size)
    engine.add_job("ftjob-1", JobConfig(batch_size=3, warmup_ratio=0.0, max_steps=2, n_epochs=2), LORA, data)
    users = [None, "first", "second", None, "scaled", "first"]
    for number, user in enumerate(users):
        prompt = prompt_of(engine, 1 + number * 6, seed=number)
        how = Sampling(
            max_tokens=4,
            temperature=number % 2 * 0.8,
            top_p=0.9,
            seed=number,
            repetition_penalty=1.5 if number % 3 == 0 else 1.0,
            logprobs=2,
        )
        engine.add(f"r{number}", prompt, how, adapter=user)
    outputs, events = run(engine, *(f"r{number}" for number in range(len(users))))
    events += run(engine)[1]
    return outputs, [event.report.train_loss for event in events if event.report is not None]


@pytest.fixture(scope="module")
def expected(folder: Path, device: torch.device) -> tuple[dict[str, Output], list[float | None]]:
    return serve(engine_of(folder, device, "torch", async_scheduling=False))


@pytest.fixture(scope="module")
def in_turn(folder: Path, device: torch.device) -> Engine:
    """Made once: what it measures at its start takes longest in the interpreter."""
    return engine_of(folder, device, "triton", async_scheduling=False)


@pytest.mark.parametrize("ahead", [False, True], ids=["in-turn", "ahead"])
def test_everybody_gets_the_tokens_that_torch_computes(
    folder: Path,
    device: torch.device,
    in_turn: Engine,
    expected: tuple[dict[str, Output], list[float | None]],
    ahead: bool,
) -> None:
    outputs, losses = expected
    engine = engine_of(folder, device, "triton", async_scheduling=True) if ahead else in_turn
    found, found_losses = serve(engine)
    assert found_losses == pytest.approx(losses, abs=1e-4) and len(losses) == 2
    for name, output in outputs.items():
        assert found[name].tokens == output.tokens
        for ours, theirs in zip(found[name].logprobs, output.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_launches_never_wait_for_a_gpu(folder: Path, device: torch.device) -> None:
    """What synchronises is refused, but for events, which only reading waits for."""
    engine = engine_of(folder, device, "triton", async_scheduling=True)
    launch = engine.runner.launch

    def watched(batch: Batch) -> InFlight:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.runner.launch = watched  # type: ignore[method-assign]
    outputs, losses = serve(engine)
    assert len(losses) == 2 and all(len(output.tokens) == 4 for output in outputs.values())


def test_recorded_decodes_say_the_same(in_turn: Engine) -> None:
    def answers(name: str) -> list[list[int]]:
        names = [f"{name}-{user}" for user in (None, "first", "second")]
        for user, request_id in zip((None, "first", "second"), names, strict=True):
            in_turn.add(request_id, prompt_of(in_turn, 9, seed=4), Sampling(max_tokens=6), adapter=user)
        outputs, _ = run(in_turn, *names)
        return [outputs[request_id].tokens for request_id in names]

    in_turn.runner.record_decodes(LIMITS["max_num_seqs"], LIMITS["max_model_len"], budget=1 << 40)
    recorded = answers("recorded")
    assert in_turn.runner.decode_graphs is not None and in_turn.runner.decode_graphs.num_recorded > 0
    in_turn.runner.decode_graphs = None
    assert answers("launched") == recorded
