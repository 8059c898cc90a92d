"""Tokens are drawn from the distribution that the parameters describe, and depend on (seed, position) alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from services.gpu_worker.engine.sampler import NUCLEUS_CANDIDATES, penalise, sample, uniform
from services.gpu_worker.engine.sequence import Sampling, Sequence

NUM_DRAWS = 4000


def make_logits(vocab_size: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def make_sequence(
    sampling: Sampling, prompt: list[int] | None = None, output: list[int] | None = None
) -> Sequence:
    prompt = prompt or [1]
    return Sequence("r", prompt + (output or []), len(prompt), sampling)


def draws(logits: Tensor, count: int = NUM_DRAWS, **fields: Any) -> Tensor:
    """Tokens of `count` sequences that differ in their seeds alone."""
    sequences = [make_sequence(Sampling(seed=seed, **fields)) for seed in range(count)]
    return torch.tensor([s.token for s in sample(logits.repeat(count, 1), sequences)])


def expected_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """The definition, slowly: temperature, top-k, top-p over what is left, min-p."""
    probs = torch.softmax(logits.double() / sampling.temperature, -1)
    order = probs.argsort(descending=True)
    kept = order[: sampling.top_k] if sampling.top_k else order
    mass, nucleus = 0.0, []
    total = float(probs[kept].sum())
    for token in kept.tolist():
        if mass / total < sampling.top_p:
            nucleus.append(token)
        mass += float(probs[token])
    nucleus = [token for token in nucleus if probs[token] >= sampling.min_p * probs.max()]
    result = torch.zeros_like(probs)
    result[nucleus] = probs[nucleus]
    return result / result.sum()


def assert_distributed(tokens: Tensor, probs: Tensor) -> None:
    """Chi-square of the counts against `probs`; cells with few expected draws are put together."""
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    assert counts[probs == 0].sum() == 0, "a token was drawn that the filters exclude"
    expected = probs * len(tokens)
    large = expected >= 5
    pairs = [*zip(counts[large].tolist(), expected[large].tolist(), strict=True)]
    rest = float(expected[~large].sum())
    if rest >= 5:
        pairs.append((float(counts[~large].sum()), rest))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)
    freedom = len(pairs) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), f"chi-square {statistic:.0f} of {freedom}"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.7, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_filtered_softmax(fields: dict[str, Any]) -> None:
    logits = make_logits(40)
    assert_distributed(draws(logits, **fields), expected_probs(logits, Sampling(**fields)))


def by_decile(probs: Tensor) -> Tensor:
    """Probability of each tenth of the tokens, the likeliest first."""
    tenths = torch.arange(len(probs)) * 10 // len(probs)
    return torch.zeros(10, dtype=probs.dtype).index_add_(0, tenths, probs.sort(descending=True).values)


@pytest.mark.parametrize("num_candidates", NUCLEUS_CANDIDATES)
@pytest.mark.parametrize(
    "fields", [{"top_p": 0.99}, {"min_p": 0.001}, {"top_p": 0.999, "min_p": 0.01}], ids=str
)
def test_filters_that_keep_more_than_the_first_candidates_are_exact(
    fields: dict[str, Any], num_candidates: int
) -> None:
    logits = make_logits(num_candidates + 1000, spread=0.5)
    sampling = Sampling(temperature=1.0, **fields)
    probs = expected_probs(logits, sampling)
    assert (probs > 0).sum() > num_candidates
    tokens = draws(logits, 1000, temperature=1.0, **fields)
    assert probs[tokens].min() > 0
    rank = probs.argsort(descending=True).argsort()[tokens]
    assert rank.max() > num_candidates
    assert_distributed((rank * 10) // len(logits), by_decile(probs))


def test_a_flat_distribution_reaches_every_token() -> None:
    tokens = draws(torch.zeros(16), 2000, temperature=1.0)
    assert_distributed(tokens, torch.full((16,), 1 / 16, dtype=torch.float64))


def test_the_draws_of_one_sequence_are_independent_from_token_to_token() -> None:
    values = torch.tensor([uniform(42, position) for position in range(5000)])
    assert values.min() >= 0 and values.max() < 1
    assert_distributed((values * 20).long(), torch.full((20,), 1 / 20, dtype=torch.float64))
    pairs = (values[:-1] * 5).long() * 5 + (values[1:] * 5).long()
    assert_distributed(pairs, torch.full((25,), 1 / 25, dtype=torch.float64))


def test_the_same_seed_and_position_draw_the_same_token_in_any_batch() -> None:
    logits = make_logits(60)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=11)
    alone = sample(logits[None].clone(), [make_sequence(sampling)])[0].token
    others = [make_sequence(Sampling(temperature=t, seed=i)) for i, t in enumerate((0.0, 1.0, 0.3))]
    batch = torch.stack([make_logits(60, 1), make_logits(60, 2), logits, make_logits(60, 3)])
    shared = sample(batch, [others[0], others[1], make_sequence(sampling), others[2]])
    assert shared[2].token == alone


def test_seeds_and_positions_lead_to_different_tokens() -> None:
    logits = torch.zeros(1, 1000)
    by_seed = {
        sample(logits.clone(), [make_sequence(Sampling(temperature=1.0, seed=s))])[0].token for s in range(20)
    }
    at = [make_sequence(Sampling(temperature=1.0), output=[5] * n) for n in range(20)]
    by_position = {sample(logits.clone(), [sequence])[0].token for sequence in at}
    assert len(by_seed) > 15 and len(by_position) > 15


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 1e-30, 1e-6])
def test_no_temperature_and_almost_none_are_greedy(temperature: float) -> None:
    logits = make_logits(50) * 1000
    assert draws(logits, 10, temperature=temperature).tolist() == [int(logits.argmax())] * 10


def test_top_k_of_one_is_greedy_and_more_than_the_vocabulary_is_everything() -> None:
    logits = make_logits(30)
    assert set(draws(logits, 50, temperature=2.0, top_k=1).tolist()) == {int(logits.argmax())}
    sampling = Sampling(temperature=2.0)
    assert_distributed(draws(logits, temperature=2.0, top_k=500), expected_probs(logits, sampling))


def test_a_nucleus_smaller_than_the_likeliest_token_keeps_that_token() -> None:
    logits = make_logits(30)
    assert set(draws(logits, 50, temperature=1.0, top_p=1e-6).tolist()) == {int(logits.argmax())}


# --- penalties


def test_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits = torch.tensor([2.0, -2.0, 3.0, -3.0, 1.0])
    sequence = make_sequence(Sampling(repetition_penalty=2.0), prompt=[0, 1], output=[1, 4])
    assert penalise(logits, sequence).tolist() == [1.0, -4.0, 3.0, -3.0, 0.5]


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    logits = torch.zeros(5)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    sequence = make_sequence(sampling, prompt=[0, 0, 3], output=[1, 1, 2])
    assert penalise(logits, sequence).tolist() == [0.0, -1.0, -0.75, 0.0, 0.0]


def test_a_bias_is_added_after_the_penalties() -> None:
    logits = torch.tensor([4.0, 1.0, 0.0])
    sampling = Sampling(repetition_penalty=2.0, logit_bias=((0, 1.0), (2, -5.0)))
    assert penalise(logits, make_sequence(sampling, prompt=[0])).tolist() == [3.0, 1.0, -5.0]


def test_a_bias_can_force_and_ban_tokens() -> None:
    logits = make_logits(20)
    best = int(logits.argmax())
    forced = sample(logits[None].clone(), [make_sequence(Sampling(logit_bias=((7, 100.0),)))])[0].token
    banned = draws(logits, 500, temperature=1.0, logit_bias=((best, -100.0),))
    assert forced == 7 and best not in banned.tolist()


def test_penalties_of_one_row_leave_the_others_alone() -> None:
    logits = make_logits(30)
    best = int(logits.argmax())
    rows = [make_sequence(Sampling(logit_bias=((best, -100.0),))), make_sequence(Sampling())]
    tokens = [s.token for s in sample(logits.repeat(2, 1), rows)]
    assert tokens[0] != best and tokens[1] == best


# --- log-probabilities


def test_logprobs_are_those_of_the_unmodified_model() -> None:
    logits = make_logits(40)
    expected = torch.log_softmax(logits, -1)
    sampling = Sampling(temperature=0.5, top_k=3, logit_bias=((7, 3.0),), repetition_penalty=1.5, logprobs=4)
    drawn = sample(logits[None].clone(), [make_sequence(sampling)])[0]
    assert drawn.logprob is not None
    assert drawn.logprob.logprob == pytest.approx(float(expected[drawn.token]), abs=1e-5)
    values, ids = expected.topk(4)
    assert [token for token, _ in drawn.logprob.top] == ids.tolist()
    assert [value for _, value in drawn.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    drawn = sample(make_logits(8)[None], [make_sequence(Sampling(logprobs=20))])[0]
    assert drawn.logprob is not None and len(drawn.logprob.top) == 8


def test_rows_without_logprobs_get_none() -> None:
    wanted = replace(Sampling(), logprobs=0)
    rows = sample(make_logits(8).repeat(2, 1), [make_sequence(Sampling()), make_sequence(wanted)])
    assert rows[0].logprob is None and rows[1].logprob is not None and rows[1].logprob.top == ()
