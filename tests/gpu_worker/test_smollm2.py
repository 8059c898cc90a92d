"""The default model, real weights: the same text as transformers, and the same text in peft after our training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from services.errors import OperatorError
from services.gpu_worker.engine.config import EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.peft import LoraConfig
from services.model_pull import DEFAULT_MODEL, pull_model
from shared.tokenizer import ChatTokenizer
from tests.gpu_worker.engines import run

QUESTIONS = [
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "A train travels 60 km in one hour. How far does it travel in 3 hours?",
    "Anna had 10 coins and lost 4. How many are left?",
    "There are 5 boxes with 6 pens each. How many pens are there?",
    "A cake is cut into 8 slices and 3 are eaten. How many slices remain?",
    "What is 12 plus 30?",
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Translate 'good morning' into German.",
    "Write a haiku about rain.",
    "Why is the sky blue?",
    "What does HTTP stand for?",
    "List the first five prime numbers.",
    "Who wrote Hamlet?",
    "Give me a synonym of 'fast'.",
    "How many days are there in a leap year?",
    "What is the chemical symbol of gold?",
    "Explain photosynthesis in one sentence.",
    "Count down from five.",
    "Say hello.",
]
LORA = LoraConfig(4, 16.0, ("q_proj", "v_proj", "o_proj", "up_proj"))
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return pull_model(DEFAULT_MODEL.name, Path(__file__).parents[2] / ".flexllm" / "models").path
    except OperatorError as error:
        pytest.skip(f"the default model cannot be pulled: {error}")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = ChatTokenizer(folder)
    return [
        tokenizer.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True)
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    torch.set_num_threads(1)
    scheduler = SchedulerConfig(
        max_num_seqs=20, max_num_batched_tokens=128, max_model_len=256, finetune_window=64, idle_ms=10_000.0
    )
    return Engine(
        EngineConfig(
            folder,
            device="cpu",
            dtype="float32",
            kv_cache_bytes=256 << 20,
            finetune_tokens_in_flight=128,
            slos={DEFAULT_TIER: SLO(tpot_ms=60_000.0, ttft_ms=60_000.0)},
            scheduler=scheduler,
        )
    )


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def answer_all(engine: Engine, prompts: list[list[int]], adapter: str | None = None) -> list[list[int]]:
    names = [f"r{index}" for index in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add(name, prompt, Sampling(max_tokens=MAX_TOKENS), adapter=adapter)
    outputs, _ = run(engine, *names)
    return [outputs[name].tokens for name in names]


def assert_greedy(model: Any, prompt: list[int], output: list[int]) -> None:
    """Every token is the likeliest after those before it: what greedy decoding of `model` would have said."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == output


@pytest.fixture(scope="module")
def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Of the base model."""
    return answer_all(engine, prompts)


def test_greedy_text_equals_transformers(
    reference: Any, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    for prompt, output in zip(prompts, answers, strict=True):
        assert len(output) == MAX_TOKENS
        assert_greedy(reference, prompt, output)


def test_an_adapter_trained_here_gives_the_same_text_in_peft(
    engine: Engine,
    reference: Any,
    folder: Path,
    prompts: list[list[int]],
    answers: list[list[int]],
    tmp_path: Path,
) -> None:
    tokenizer = ChatTokenizer(folder)
    examples = [
        tokenizer.encode_training(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )
        for question, answer in zip(QUESTIONS[:4], ("#### 7", "#### 180", "#### 6", "#### 30"), strict=True)
    ]
    engine.add_job("ftjob-1", JobConfig(n_epochs=3, batch_size=2, learning_rate=5e-3), LORA, pack(examples))
    _, events = run(engine)
    losses = [event.report.train_loss for event in events if event.report is not None]
    assert events[-1].finished and losses[-1] < losses[0]
    files = engine.export_job("ftjob-1", DEFAULT_MODEL.name)
    engine.load_adapter("a" * 64, files)
    after = answer_all(engine, prompts, "a" * 64)
    assert sum(a != b for a, b in zip(after, answers, strict=True)) > 10
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    peft = PeftModel.from_pretrained(reference, tmp_path).eval()
    for prompt, output in zip(prompts, after, strict=True):
        assert_greedy(peft, prompt, output)


def pack(examples: list[tuple[list[int], list[int]]]) -> Dataset:
    ends = np.cumsum([len(tokens) for tokens, _ in examples])
    return Dataset(
        np.concatenate([tokens for tokens, _ in examples]).astype(np.int32),
        np.concatenate([mask for _, mask in examples]).astype(np.uint8),
        np.concatenate([[0], ends]).astype(np.int64),
    )
