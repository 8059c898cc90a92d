"""Log-probabilities, of prompts and of what is generated, equal those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.gpu_worker.engine.sequence import Sampling
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import make_engine, prompt_of, together

LENGTHS = (1, 2, 5, 8, 9, 16, 23, 32, 40, 55)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tied=False)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    engine = make_engine(folder)
    return [prompt_of(engine, length, seed=length) for length in LENGTHS]


@pytest.mark.parametrize("budget", [2, 9, 64])
def test_prompt_logprobs_equal_transformers_across_the_borders_of_pieces(
    folder: Path, prompts: list[list[int]], budget: int
) -> None:
    engine = make_engine(folder, scheduler={"max_num_batched_tokens": budget})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chosen = [prompts[3], prompts[0], prompts[7], prompts[4]]
    outputs = together(engine, chosen, [Sampling(max_tokens=0, prompt_logprobs=3)] * len(chosen))
    for prompt, output in zip(chosen, outputs, strict=True):
        assert (output.tokens, output.finish) == ([], "length")
        with torch.no_grad():
            expected = torch.log_softmax(reference(torch.tensor([prompt])).logits[0], -1)
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for position, entry in enumerate(output.prompt_logprobs[1:]):
            assert entry is not None
            assert entry.logprob == pytest.approx(float(expected[position, prompt[position + 1]]), abs=1e-4)
            assert [token for token, _ in entry.top] == expected[position].topk(3).indices.tolist()


def test_prompt_logprobs_survive_a_preemption(folder: Path, prompts: list[list[int]]) -> None:
    sampling = [Sampling(max_tokens=10, prompt_logprobs=0)] * 6
    calm = together(make_engine(folder), prompts[-6:], sampling)
    pressed = make_engine(
        folder, num_blocks=24, scheduler={"max_model_len": 72, "max_num_batched_tokens": 16}
    )
    for expected, output in zip(calm, together(pressed, prompts[-6:], sampling), strict=True):
        assert output.prompt_logprobs is not None and expected.prompt_logprobs is not None
        assert [p and round(p.logprob, 3) for p in output.prompt_logprobs] == [
            p and round(p.logprob, 3) for p in expected.prompt_logprobs
        ]


def test_logprobs_of_generated_tokens_equal_transformers(folder: Path, prompts: list[list[int]]) -> None:
    engine = make_engine(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sampling = Sampling(max_tokens=6, temperature=0.7, seed=3, logprobs=5)
    outputs = together(engine, prompts, [sampling] * len(prompts))
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(reference(torch.tensor([prompt + output.tokens])).logits[0], -1)
        assert len(output.logprobs) == 6
        for offset, (token, entry) in enumerate(zip(output.tokens, output.logprobs, strict=True)):
            row = expected[len(prompt) - 1 + offset]
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [value for _, value in entry.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
