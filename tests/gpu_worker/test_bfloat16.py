"""The dtype that is served: as close to float32 as rounding lets it be, and as indifferent to neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.kernels.linear import DenseLinear
from services.gpu_worker.model.peft import LoraConfig
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import generate, make_engine, prompt_of, run
from tests.gpu_worker.training import make_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen2", num_heads=8)


def both(folder: Path) -> list[Engine]:
    return [make_engine(folder, dtype=dtype, num_blocks=512) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("num_rows", [1, 3, 16, 70])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_weight_multiplies_like_a_plain_one(num_rows: int, has_bias: bool) -> None:
    x, weight = torch.randn(num_rows, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    bias = torch.randn(96).bfloat16() if has_bias else None
    plain = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(DenseLinear(weight, bias).forward(x), plain, rtol=1e-2, atol=5e-2)


def test_only_what_gains_by_it_is_packed() -> None:
    wide = DenseLinear(torch.randn(8, 8))
    assert wide.size_bytes == 8 * 8 * 4
    narrow = DenseLinear(torch.randn(8, 8).bfloat16())
    packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert narrow.size_bytes == 8 * 8 * 2 * (2 if packs else 1)


def test_log_probabilities_are_close_to_those_of_float32(folder: Path) -> None:
    sampling = Sampling(max_tokens=0, prompt_logprobs=0)
    found = []
    for engine in both(folder):
        logprobs = generate(engine, prompt_of(engine, 60), sampling).prompt_logprobs
        assert logprobs is not None
        found.append(torch.tensor([entry.logprob for entry in logprobs if entry is not None]))
    assert (found[0] - found[1]).abs().mean() < 0.05


def test_decoding_agrees_with_computing_the_prompt_at_once(folder: Path) -> None:
    engine = both(folder)[1]
    prompt = prompt_of(engine, 20)
    output = generate(engine, prompt, Sampling(max_tokens=16, logprobs=0))
    again = generate(
        engine, prompt + output.tokens, Sampling(max_tokens=0, prompt_logprobs=0), cache_salt="x"
    )
    assert again.prompt_logprobs is not None
    decoded = torch.tensor([entry.logprob for entry in output.logprobs])
    at_once = torch.tensor([entry.logprob for entry in again.prompt_logprobs[20:] if entry is not None])
    assert (decoded - at_once).abs().max() < 0.15


def test_training_follows_the_float32_curve(folder: Path) -> None:
    curves = []
    for engine in both(folder):
        dataset = make_dataset([40, 21, 33, 60], engine.model.config.vocab_size)
        lora = LoraConfig(4, 8.0, ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
        engine.add_job("ftjob-1", JobConfig(n_epochs=15, batch_size=2, learning_rate=0.01), lora, dataset)
        _, events = run(engine)
        losses = [event.report.train_loss for event in events if event.report is not None]
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < curves[0][0] - 0.5
    assert (curves[0] - curves[1]).abs().max() < 0.1
