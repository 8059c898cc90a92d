"""Draws the next tokens. Randomness is a hash of (seed, position): no generator, no state, the same token
whoever shares the batch and wherever a crashed sequence is taken up again."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from services.gpu_worker.engine.batch import Sampled
from services.gpu_worker.engine.sequence import Logprob, Sampling, Sequence

NUCLEUS_CANDIDATES = (512, 8192)  # most likely tokens looked at before a full sort, which takes far longer
GREEDY_BELOW = 1e-5  # temperatures that a division would overflow at
LEAST_LOGPROB = -9999.0
MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone (splitmix64's finaliser)."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


@torch.no_grad()
def sample(logits: Tensor, sequences: list[Sequence]) -> list[Sampled]:
    """One token for each row of float32 `logits` [R, V]. Logprobs are those of the unmodified model."""
    logprobs = _row_logprobs(logits, sequences)
    for row, sequence in enumerate(sequences):
        if sequence.sampling.has_penalties:
            logits[row] = penalise(logits[row], sequence)
    best, tokens = (found.tolist() for found in logits.max(-1))
    random_rows = [
        row
        for row, sequence in enumerate(sequences)
        if sequence.sampling.temperature > GREEDY_BELOW and math.isfinite(best[row])
    ]  # an adapter that overflows is answered with some token: the others in the batch go on
    if random_rows:
        chosen = _draw(logits[random_rows], [sequences[r] for r in random_rows])
        for row, token in zip(random_rows, chosen, strict=True):
            tokens[row] = token
    return [
        Sampled(sequence, token, _entry(logprobs.get(row), token, sequence.sampling.logprobs))
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
    ]


def penalise(logits: Tensor, sequence: Sequence) -> Tensor:
    """Repetition counts prompt and output; presence and frequency the output alone; the bias comes last."""
    sampling, logits = sequence.sampling, logits.clone()
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens[sequence.num_virtual_tokens :])), device=logits.device)
        values = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    counts = Counter(sequence.tokens[sequence.num_prompt_tokens :])
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        ids = torch.tensor(list(counts), device=logits.device)
        amounts = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * amounts
    if sampling.logit_bias:
        ids = torch.tensor([token for token, _ in sampling.logit_bias], device=logits.device)
        logits[ids] += torch.tensor(
            [b for _, b in sampling.logit_bias], dtype=logits.dtype, device=logits.device
        )
    return logits


def _draw(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    temperatures = torch.tensor([s.sampling.temperature for s in sequences], dtype=logits.dtype)
    probs = torch.softmax(logits / temperatures.to(logits.device)[:, None], -1)
    draws = [uniform(s.sampling.seed, s.num_tokens) for s in sequences]
    return [
        _draw_row(row, sequence.sampling, draw)
        for row, sequence, draw in zip(probs, sequences, draws, strict=True)
    ]


def _draw_row(probs: Tensor, sampling: Sampling, draw: float) -> int:
    """Inverse of the cumulative distribution at `draw`, over the tokens that the filters leave."""
    ids = None
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
        probs, ids = _filter(probs, sampling)
    cumulative = probs.double().cumsum(0)
    target = draw * cumulative[-1]
    index = int(torch.searchsorted(cumulative, target, right=True).clamp_(max=len(probs) - 1))
    return index if ids is None else int(ids[index])


def _filter(probs: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The kept tokens' probabilities, falling, and their ids. top-k first, then top-p, then min-p."""
    kept, ids = _candidates(probs, sampling)
    keep = torch.ones_like(kept, dtype=torch.bool)
    if sampling.top_p < 1:
        share = kept / kept.sum() if sampling.top_k else kept
        keep &= share.cumsum(0) - share < sampling.top_p
    if sampling.min_p > 0:
        keep &= kept >= sampling.min_p * kept[0]
    return kept[keep], ids[keep]


def _candidates(probs: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities, falling, and ids of at least those that the filters keep."""
    if sampling.top_k:
        return probs.topk(min(sampling.top_k, len(probs)))
    for most in NUCLEUS_CANDIDATES:
        if most < len(probs):
            kept, ids = probs.topk(most)
            if _confined(kept, sampling):
                return kept, ids
    return probs.sort(descending=True)


def _confined(kept: Tensor, sampling: Sampling) -> bool:
    """Whether a filter leaves nothing outside of `kept`, the most likely tokens."""
    by_mass = sampling.top_p < 1 and float(kept.sum()) >= sampling.top_p
    by_ratio = sampling.min_p > 0 and float(kept[-1]) < sampling.min_p * float(kept[0])
    return by_mass or by_ratio


def _row_logprobs(logits: Tensor, sequences: list[Sequence]) -> dict[int, Tensor]:
    rows = [r for r, s in enumerate(sequences) if s.sampling.logprobs is not None]
    return dict(zip(rows, torch.log_softmax(logits[rows], -1), strict=True)) if rows else {}


def _entry(logprobs: Tensor | None, token: int, num_top: int | None) -> Logprob | None:
    return None if logprobs is None or num_top is None else logprob_entry(logprobs, token, num_top)


def logprob_entry(logprobs: Tensor, token: int, num_top: int) -> Logprob:
    """`logprobs` [V] of one position."""
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    top = tuple(zip(ids.tolist(), map(_finite, values.tolist()), strict=True))
    return Logprob(_finite(float(logprobs[token])), top)


def _finite(logprob: float) -> float:
    """JSON has neither infinity nor NaN."""
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
