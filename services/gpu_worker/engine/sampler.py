"""Draws the next tokens. Randomness is a hash of (seed, position): no generator, no state, the same token
whoever shares the batch and wherever a crashed sequence is taken up again."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from services.gpu_worker.engine.batch import Sampled
from services.gpu_worker.engine.sequence import Logprob, Sampling, Sequence
from services.gpu_worker.kernels.sampling import SamplingRows
from services.gpu_worker.kernels.transfer import Readback, to_device

NUCLEUS_CANDIDATES = (512, 8192)  # most likely tokens looked at before a full sort, which takes far longer
GREEDY_BELOW = 1e-5  # temperatures that a division would overflow at
LEAST_LOGPROB = -9999.0
MASK64 = (1 << 64) - 1
SampleTokens = Callable[[Tensor, SamplingRows], Tensor]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone (splitmix64's finaliser)."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


class Drawn:
    """A token for each of some sequences: on the device at once, on the host when it is read."""

    def __init__(
        self, sequences: list[Sequence], tokens: Tensor, rows: list[int], logprobs: Tensor | None
    ) -> None:
        """`tokens` int64 [R]; `logprobs` [n, V] of those `rows` that give alternatives."""
        self.tokens = tokens
        self.row_of = {sequence: row for row, sequence in enumerate(sequences)}
        self._read_tokens = Readback(tokens)
        self._rows = rows
        self._logprobs: LogprobRows | None = None
        if logprobs is not None:
            nums_top = [sequences[row].sampling.logprobs or 0 for row in rows]
            self._logprobs = LogprobRows(logprobs, tokens[_ids(rows, tokens.device)], nums_top)

    def read(self) -> list[Sampled]:
        tokens = self._read_tokens.read().tolist()
        entries = dict(zip(self._rows, self._logprobs.read(), strict=True)) if self._logprobs else {}
        return [Sampled(s, tokens[row], entries.get(row)) for s, row in self.row_of.items()]


class LogprobRows:
    """Log-probabilities of the tokens of some positions and of the most likely ones, on their way to the host."""

    def __init__(self, logprobs: Tensor, tokens: Tensor, nums_top: list[int]) -> None:
        """`logprobs` [n, V], `tokens` int64 [n]; `nums_top` of each row's alternatives."""
        values, ids = logprobs.topk(min(max(nums_top), logprobs.shape[1]))
        self._values = Readback(torch.cat((logprobs.gather(1, tokens[:, None]), values), 1))
        self._ids = Readback(ids)
        self._nums_top = nums_top

    def read(self) -> list[Logprob]:
        rows = zip(self._values.read().tolist(), self._ids.read().tolist(), self._nums_top, strict=True)
        return [
            Logprob(_finite(values[0]), tuple(zip(ids[:n], map(_finite, values[1 : n + 1]), strict=True)))
            for values, ids, n in rows
        ]


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Sampled]:
    """One token for each row of float32 `logits` [R, V], which are overwritten."""
    return draw(logits, sequences).read()


@torch.no_grad()
def draw(
    logits: Tensor,
    sequences: list[Sequence],
    before: Drawn | None = None,
    sample_tokens: SampleTokens | None = None,
    tokens: Tensor | None = None,
) -> Drawn:
    """As `sample`; where there is a kernel for all rows, without waiting for the device. Logprobs are those of the
    unmodified model.

    `before` has the tokens that are pending; of each sequence none but the last may be. `tokens` int64 [R] have been
    drawn already where no sequence has penalties.
    """
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    logprobs = torch.log_softmax(logits[_ids(rows, logits.device)], -1) if rows else None
    if tokens is not None and not have_penalties(sequences):
        return Drawn(sequences, tokens, rows, logprobs)
    for row, sequence in enumerate(sequences):
        if sequence.sampling.has_penalties:
            logits[row] = penalise(logits[row], sequence, _pending(sequence, before))
    if sample_tokens is None:
        tokens = _choose_by_row(logits, sequences)
    else:
        tokens = sample_tokens(logits.float(), sampling_rows(sequences, logits.device))
    return Drawn(sequences, tokens, rows, logprobs)


def have_penalties(sequences: list[Sequence]) -> bool:
    """Whether some of them draw from other logits than the model's."""
    return any(sequence.sampling.has_penalties for sequence in sequences)


def _pending(sequence: Sequence, before: Drawn | None) -> Tensor | None:
    """[1], on the device."""
    if not sequence.num_pending_tokens:
        return None
    assert before is not None and sequence.num_pending_tokens == 1
    row = before.row_of[sequence]
    return before.tokens[row : row + 1]


def sampling_rows(sequences: list[Sequence], device: torch.device) -> SamplingRows:
    """How each sequence draws its next token, a row each."""
    chosen = [sequence.sampling for sequence in sequences]
    return SamplingRows.make(
        [s.temperature for s in chosen],
        [s.top_k for s in chosen],
        [s.top_p for s in chosen],
        [s.min_p for s in chosen],
        [s.seed for s in chosen],
        [sequence.num_tokens for sequence in sequences],
        device,
    )


def _choose_by_row(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Without sorting rows whose filters leave few tokens."""
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
    return torch.tensor(tokens, dtype=torch.int64)


def penalise(logits: Tensor, sequence: Sequence, pending: Tensor | None = None) -> Tensor:
    """Repetition counts prompt and output; presence and frequency the output alone; the bias comes last. `pending`
    int64 [n] are the output's last tokens where they are not known yet."""
    sampling, logits = sequence.sampling, logits.clone()
    known = sequence.tokens[: sequence.num_known_tokens]
    if sampling.repetition_penalty != 1.0:
        seen = _ids(sorted(set(known[sequence.num_virtual_tokens :])), logits.device, pending)
        values = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if sampling.presence_penalty or sampling.frequency_penalty:
        ids = _ids(known[sequence.num_prompt_tokens :], logits.device, pending)
        counts = torch.zeros_like(logits).index_add_(0, ids, torch.ones_like(ids, dtype=logits.dtype))
        logits -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts
    if sampling.logit_bias:
        ids = _ids([token for token, _ in sampling.logit_bias], logits.device)
        biases = torch.tensor([bias for _, bias in sampling.logit_bias], dtype=logits.dtype)
        logits[ids] += to_device(biases, logits.device)
    return logits


def _ids(tokens: list[int], device: torch.device, pending: Tensor | None = None) -> Tensor:
    ids = to_device(torch.tensor(tokens, dtype=torch.int64), device)
    return ids if pending is None else torch.cat((ids, pending))


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


def _finite(logprob: float) -> float:
    """JSON has neither infinity nor NaN."""
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
