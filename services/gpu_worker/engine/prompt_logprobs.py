"""Log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from services.gpu_worker.engine.batch import Chunk
from services.gpu_worker.engine.sampler import LogprobRows
from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.kernels.transfer import to_device
from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.context import runs_of
from services.gpu_worker.model.transformer import Transformer

MAX_ROWS = 64  # whose full logits exist at a time


def prompt_logprobs(
    model: Transformer, chunk: Chunk, hidden: Tensor, adapter: AdapterWeights | None
) -> Iterator[Callable[[], None]]:
    """Of a chunk, whose hidden states are [n, D]: row i predicts token i + 1 of the prompt, and the first token has no
    prediction. Gives what reads them."""
    sequence: Sequence = chunk.sequence
    num_top = sequence.sampling.prompt_logprobs
    assert num_top is not None
    if chunk.start == 0:
        yield partial(_begin, sequence)
    first = max(chunk.start, sequence.num_virtual_tokens)
    last = min(chunk.start + chunk.num_tokens, sequence.num_prompt_tokens - 1)
    count = max(0, last - first)
    predicted = to_device(torch.tensor(sequence.tokens[first + 1 : last + 1]), model.weights.device)
    hidden = hidden[first - chunk.start :]
    for start in range(0, count, MAX_ROWS):
        piece = hidden[start : min(start + MAX_ROWS, count)]
        logits = model.logits(piece, runs_of([(0, len(piece), adapter)]))
        tokens = predicted[start : start + len(piece)]
        rows = LogprobRows(torch.log_softmax(logits, -1), tokens, [num_top] * len(piece))
        yield partial(_read, sequence, rows)


def _begin(sequence: Sequence) -> None:
    sequence.prompt_logprobs = [None]


def _read(sequence: Sequence, rows: LogprobRows) -> None:
    sequence.prompt_logprobs += rows.read()
