"""Drawing tokens for a batch: the kernel and its torch twin against the engine's sampler, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from services.gpu_worker.engine import sampler
from services.gpu_worker.engine.sampler import sampling_rows
from services.gpu_worker.engine.sequence import Sampling, Sequence
from services.gpu_worker.kernels import sampling as torch_twin
from services.gpu_worker.kernels.sampling import SamplingRows
from services.gpu_worker.kernels.triton import sampling as kernels
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape
from tests.kernels.triton.twins import Numbers

both = pytest.mark.parametrize("ops", [torch_twin, kernels], ids=["torch", "triton"])
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100_000},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.6},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 0.0},
    {"temperature": 0.1},
    {"temperature": 30.0, "top_p": 0.5},
    {"temperature": 30.0},
]


def make_sequences(fields: list[dict[str, Any]], seed: int = 0) -> list[Sequence]:
    """Each with its own seed and length."""
    return [
        Sequence(
            "r", [1] * (1 + i % 5), 1, Sampling(**{"temperature": 0.9, "seed": seed + 7919 * i, **field})
        )
        for i, field in enumerate(fields)
    ]


def engine_tokens(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    return [drawn.token for drawn in sampler.sample(logits.clone(), sequences)]


@both
@pytest.mark.parametrize("size", [16, 301])
def test_tokens_are_those_of_the_engine(ops: Any, size: int, device: torch.device) -> None:
    sequences = make_sequences(FILTERS)
    logits = Numbers(torch.float32, device)(len(sequences), size, scale=3)
    found = ops.sample_tokens(logits, sampling_rows(sequences, device))
    assert found.tolist() == engine_tokens(logits, sequences)


@both
def test_a_vocabulary_of_one_token_gives_it(ops: Any, device: torch.device) -> None:
    sequences = make_sequences([{}, {"top_k": 2, "top_p": 0.5, "min_p": 0.5}, {"temperature": 0.0}])
    found = ops.sample_tokens(torch.ones(3, 1, device=device), sampling_rows(sequences, device))
    assert found.tolist() == [0, 0, 0]


@both
@pytest.mark.parametrize("fields", [{}, {"top_k": 30, "top_p": 0.7}, {"min_p": 0.01}], ids=str)
def test_a_row_of_several_blocks_is_one_row(ops: Any, fields: dict[str, Any], device: torch.device) -> None:
    sequences = make_sequences([fields] * 3)
    logits = Numbers(torch.float32, device).apart(3, 2 * kernels.BLOCK + 5)
    found = ops.sample_tokens(logits, sampling_rows(sequences, device))
    assert found.tolist() == engine_tokens(logits, sequences)


@pytest.mark.parametrize("room", [0, 24])
def test_rows_with_more_likely_tokens_than_there_is_room_for_are_looked_at_whole(
    room: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "CANDIDATES", room)
    sequences = make_sequences([{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 30, "top_p": 0.9}])
    logits = Numbers(torch.float32, device)(len(sequences), 100, scale=3)
    logits[:2, 20:] -= 30  # leaves 20 likely ones
    found = kernels.sample_tokens(logits, sampling_rows(sequences, device))
    assert found.tolist() == engine_tokens(logits, sequences)


@both
def test_seeds_of_all_64_bits_give_the_engines_numbers(ops: Any, device: torch.device) -> None:
    seeds = [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x123456789ABCDEF0]
    sequences = [Sequence("r", [1] * 9, 1, Sampling(temperature=1.0, seed=seed)) for seed in seeds]
    logits = torch.zeros(len(seeds), 1000, device=device)  # the token tells three digits of the number
    found = ops.sample_tokens(logits, sampling_rows(sequences, device))
    assert found.tolist() == [int(1000 * sampler.uniform(seed, 9)) for seed in seeds]


def test_the_twins_numbers_are_the_engines_to_the_last_bit() -> None:
    seeds, positions = [0, 5, 1 << 63, (1 << 64) - 1], [0, 1, 77, 1 << 40]
    rows = SamplingRows.make([1.0] * 4, [0] * 4, [1.0] * 4, [0.0] * 4, seeds, positions, torch.device("cpu"))
    found = torch_twin.uniform(rows.seed, rows.position).tolist()
    assert found == [sampler.uniform(seed, at) for seed, at in zip(seeds, positions, strict=True)]


@both
def test_equal_logits_are_kept_by_their_number(ops: Any, device: torch.device) -> None:
    """Of ten equal tokens, top-k keeps 3 and top-p 0.5 keeps 5, each as likely as the next."""
    logits = torch.zeros(5, 10, device=device)
    for fields, kept in (({"top_k": 3}, 3), ({"top_p": 0.5}, 5), ({"min_p": 1.0}, 10)):
        sequences = make_sequences([fields] * 5)
        found = ops.sample_tokens(logits, sampling_rows(sequences, device))
        expected = [int(kept * sampler.uniform(s.sampling.seed, s.num_tokens)) for s in sequences]
        assert found.tolist() == expected


@both
def test_draws_follow_the_distribution(ops: Any, device: torch.device) -> None:
    """Chi-squared with four degrees of freedom: 18.5 is passed once in a thousand, and the seeds are fixed."""
    count = 200
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5], device=device)
    sequences = [Sequence("r", [1], 1, Sampling(temperature=1.0, seed=seed)) for seed in range(count)]
    found = ops.sample_tokens(logits.repeat(count, 1), sampling_rows(sequences, device))
    expected = logits.double().softmax(-1) * count
    observed = torch.bincount(found, minlength=5)
    assert float(((observed - expected).square() / expected).sum()) < 18.5


@both
def test_who_shares_the_batch_changes_nothing(ops: Any, device: torch.device) -> None:
    sequences = make_sequences([{}, {"top_k": 4}, {"temperature": 0.0}, {"min_p": 0.1}])
    logits = Numbers(torch.float32, device)(len(sequences), 50, scale=2)
    together = ops.sample_tokens(logits, sampling_rows(sequences, device)).tolist()
    back = ops.sample_tokens(logits.flip(0), sampling_rows(sequences[::-1], device)).tolist()
    assert together == back[::-1]


@both
def test_tokens_that_a_mask_forbids_are_never_drawn(ops: Any, device: torch.device) -> None:
    sequences = make_sequences([{}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 1e-9}] * 2)
    logits = torch.full((len(sequences), 40), float("-inf"), device=device)
    logits[:, [3, 17]] = 0.0
    assert set(ops.sample_tokens(logits, sampling_rows(sequences, device)).tolist()) == {3, 17}


@both
def test_a_row_that_overflowed_leaves_the_others_alone(ops: Any, device: torch.device) -> None:
    sequences = make_sequences([{}, {"top_p": 0.5}, {}, {"top_k": 2}, {}])
    logits = Numbers(torch.float32, device)(5, 33)
    expected = ops.sample_tokens(logits, sampling_rows(sequences, device)).tolist()
    logits[1, 4], logits[2], logits[3] = float("inf"), float("nan"), float("-inf")
    found = ops.sample_tokens(logits, sampling_rows(sequences, device)).tolist()
    assert (found[0], found[4]) == (expected[0], expected[4])
    assert found[1] == 4
    assert all(0 <= token < 33 for token in found)


def test_what_the_kernel_cannot_do_is_refused_with_its_shape(device: torch.device) -> None:
    rows = sampling_rows(make_sequences([{}, {}]), device)
    with pytest.raises(UnsupportedShape, match=r"temperature is \[2\] and not \[3\]"):
        kernels.sample_tokens(torch.zeros(3, 4, device=device), rows)
    with pytest.raises(UnsupportedShape, match=r"logits \[2, 4\] are torch.float16 and not float32"):
        kernels.sample_tokens(torch.zeros(2, 4, device=device, dtype=torch.float16), rows)
