"""What is run of every kernel, on shapes of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from services.gpu_worker.kernels.adamw import AdamW
from services.gpu_worker.kernels.bypass import BlockGradient
from services.gpu_worker.kernels.linear import DenseLinear
from services.gpu_worker.kernels.lora_stream import LoraPairs, LoraStream, StreamRun
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.kernels.paged_attention import PagedBatch, Run, paged_attention
from services.gpu_worker.kernels.sampling import SamplingRows

EPS = 1e-5
BLOCK_SIZE = 16
Outputs = Sequence[Tensor]
Heads = tuple[int, int, int]  # of keys, of queries for each of them, and their size


class Numbers:
    """Normal numbers as a kernel of type `seen` has them, in any type: the same for all of them."""

    def __init__(self, seen: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
        self.seen, self.dtype, self.device = seen, dtype, device
        self._random = torch.Generator(device).manual_seed(0)

    @property
    def wide(self) -> torch.dtype:
        """Of sums."""
        return accumulation_dtype(self.dtype)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self._random, device=self.device) * scale
        return drawn.to(self.seen).to(self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.wide, device=self.device)


@dataclass(frozen=True, slots=True)
class Check:
    """`call(form, numbers)` runs one of two modules with the same functions; what it gives is compared. Can be sent to
    another process."""

    name: str
    shape: str
    plain: str  # a module of KERNELS
    triton: str  # its twin, of KERNELS.triton
    call: Callable[[Any, Numbers], Outputs]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


def checks(bench: Bench) -> Iterator[Check]:
    """Attention as the model has it first, of other numbers of heads at the end."""
    scale, config = bench.scale, bench.weights.config
    n, d, f, e = scale.kernel_rows, config.hidden_size, config.intermediate_size, scale.head_dim
    v, group, rows = scale.kernel_vocabulary, config.num_heads // config.num_kv_heads, f"{n} x {d}"
    yield Check("rms_norm", rows, "norm_rope", "norm_rope", partial(_norm, n, d))
    yield Check("silu_mul", f"{n} x {f}", "norm_rope", "activation", partial(_silu, n, f))
    yield from _attention_checks(n, (config.num_kv_heads, group, e))
    yield Check("rope", f"{n} x 8 x {e}", "norm_rope", "norm_rope", partial(_rope, n, e))
    yield Check("rope_cache_write", f"{n} x 8 x {e}", "kv_cache", "kv_cache", partial(_cache, n, e))
    yield Check(
        "low_rank_backward_",
        f"{rows}, rank 3 x 16",
        "bypass",
        "lora_gradient",
        partial(_lora_gradient, n, d),
    )
    yield Check(
        "add_low_rank_", f"{rows}, ranks 8 to 64", "lora_stream", "lora_stream", partial(_low_rank, n, d)
    )
    loss = partial(_loss, n, d, v)
    yield Check("cross_entropy", f"{rows}, {v} tokens", "cross_entropy", "cross_entropy", loss)
    adamw = partial(_adamw, 100 * n)
    yield Check("adamw", str(100 * n), "adamw", "adamw", adamw, (torch.float32,))
    sample = partial(_sample, v)
    yield Check("sample_tokens", f"32 x {v}", "sampling", "sampling", sample, (torch.float32,))
    for other in scale.groups:
        if other != group:
            yield from _attention_checks(n, (config.num_kv_heads, other, e))


def _attention_checks(n: int, heads: Heads) -> Iterator[Check]:
    shape = f"{n} x {heads[0]} x {heads[1]} x {heads[2]}"
    yield Check("paged_attention", shape, "paged_attention", "attention", partial(_attend, n, heads))
    backward = partial(_attend_backward, n, heads)
    yield Check("paged_attention_backward", shape, "paged_attention_backward", "attention_backward", backward)


def _norm(n: int, d: int, form: Any, draw: Numbers) -> Outputs:
    x, y, dy, weight = draw(n, d), draw(n, d), draw(n, d), draw(d)
    return (
        form.rms_norm(x, weight, EPS),
        *form.add_rms_norm(x, y, weight, EPS),
        form.rms_norm_backward(dy, x, weight, EPS),
    )


def _silu(n: int, f: int, form: Any, draw: Numbers) -> Outputs:
    gate, up, dy = draw(n, f), draw(n, f), draw(n, f)
    return form.silu_mul(gate, up), *form.silu_mul_backward(dy, gate, up)


def _rotation(n: int, e: int, draw: Numbers) -> tuple[Tensor, Tensor]:
    angles = draw(n, e // 2, scale=3.0).repeat(1, 2)
    return tuple(part.to(draw.seen).to(draw.dtype) for part in (angles.cos(), angles.sin()))  # type: ignore[return-value]


def _rope(n: int, e: int, form: Any, draw: Numbers) -> Outputs:
    x, rotation = draw(n, 8, e), _rotation(n, e, draw)
    return form.rope(x, *rotation), form.rope_backward(x, *rotation)


def _cache(n: int, e: int, form: Any, draw: Numbers) -> Outputs:
    """Into blocks in the reverse order."""
    q, k, v, rotation = draw(n, 8, e), draw(n, 2, e), draw(n, 2, e), _rotation(n, e, draw)
    num_blocks = -(-n // BLOCK_SIZE)
    keys, values = (draw.zeros(num_blocks * 2, BLOCK_SIZE * e).to(draw.dtype) for _ in range(2))
    slots = torch.arange(2 * num_blocks * BLOCK_SIZE - 1, -1, -1, device=draw.device)[: 2 * n]
    return form.rope_cache_write(q, k, v, *rotation, slots, keys, values), keys, values


def _runs(n: int) -> tuple[list[Run], list[Run]]:
    """A training window over two packed examples; and pieces of prompts and decodes beside it."""
    packed = [Run(-(-n // 4), -(-n // 2)), Run(n // 3, n, first_key=-(-n // 2))]
    return packed, [Run(n // 3, n, table=1), Run(1, 1, table=2), Run(1, 4 * n, table=3), Run(1, n, table=4)]


def _paged(runs: list[Run], heads: Heads, draw: Numbers) -> tuple[Tensor, Tensor, Tensor, PagedBatch]:
    """Queries, keys, values; blocks in a random order."""
    widths = [
        max(-(-run.num_keys // BLOCK_SIZE) for run in runs if run.table == table)
        for table in range(runs[-1].table + 1)
    ]
    order = torch.randperm(sum(widths), generator=torch.Generator().manual_seed(0)).tolist()
    tables = [order[sum(widths[:i]) : sum(widths[: i + 1])] for i in range(len(widths))]
    num_kv_heads, group, e = heads
    keys, values = (draw(len(order) * num_kv_heads, BLOCK_SIZE * e) for _ in range(2))
    q = draw(sum(run.num_tokens for run in runs), num_kv_heads * group, e)
    return q, keys, values, PagedBatch.make(runs, tables, num_kv_heads, BLOCK_SIZE, draw.device)


def _attend(n: int, heads: Heads, form: Any, draw: Numbers) -> Outputs:
    packed, others = _runs(n)
    found: Outputs = form.paged_attention(*_paged(packed + others, heads, draw))
    return found


def _attend_backward(n: int, heads: Heads, form: Any, draw: Numbers) -> Outputs:
    q, keys, values, batch = _paged(_runs(n)[0], heads, draw)
    out, lse = paged_attention(q, keys, values, batch)
    dk, dv = (draw.zeros(heads[0], n, heads[2]) for _ in range(2))
    d_out = draw(*out.shape)
    return form.paged_attention_backward(d_out, q, keys, values, out, lse, batch, dk, dv), dk, dv


def _lora_gradient(n: int, d: int, form: Any, draw: Numbers) -> Outputs:
    """Of a linear that computes three projections of different widths."""
    rank, ends = 16, (0, d, d + d // 4, d + d // 2)
    x, dx, dy, low = draw(n, d), draw(n, d), draw(n, ends[-1]), draw(n, 3 * rank)
    a, b = draw(3 * rank, d), draw(ends[-1], 3 * rank, scale=ends[-1] ** -0.5)
    grad_a = draw.zeros(3 * rank, d)
    blocks = tuple(
        BlockGradient(slice(a, b), slice(i * rank, (i + 1) * rank), 2.0, draw.zeros(b - a, rank))
        for i, (a, b) in enumerate(pairwise(ends))
    )
    form.low_rank_backward_(dx, grad_a, blocks, x, dy, low, a, b)
    return dx, grad_a, *(block.grad for block in blocks)


def _low_rank(n: int, d: int, form: Any, draw: Numbers) -> Outputs:
    """Two requests with an adapter each, rows without, and a longer piece with a third adapter."""
    runs = []
    for start, end, rank in ((0, 1, 8), (1, 2, 64), (3, n, 16)):
        pair = draw(rank, d, scale=d**-0.5), draw(d, rank, scale=rank**-0.5)
        runs.append(StreamRun(start, end, LoraPairs([[pair]])))
    x, y = draw(n, d), draw(n, d)
    return [form.add_low_rank_(y, x, LoraStream(tuple(runs), draw.device), 0, 0)]


def _loss(n: int, d: int, v: int, form: Any, draw: Numbers) -> Outputs:
    x, head = draw(n, d), DenseLinear(draw(v, d, scale=2 * d**-0.5))
    labels = torch.randint(v, (n,), generator=torch.Generator().manual_seed(0)).to(draw.device)
    found = form.linear_cross_entropy(x, head, labels, float(n))
    return found.loss_sum, found.dx


def _adamw(size: int, form: Any, draw: Numbers) -> Outputs:
    masters, grad, first, second = draw(size), draw(size), draw(size), draw(size).square()
    form.adamw_(masters, grad, first, second, AdamW(3, 1e-2, weight_decay=0.1), 0.5)
    return masters, first, second


def _sample(v: int, form: Any, draw: Numbers) -> Outputs:
    """Tokens: either the same, or a large error. Rows are greedy, unfiltered, and with each of the filters."""
    seeds = list(range(32))
    rows = SamplingRows.make(
        temperature=[0.0, 1.0, 0.8, 1.0] * 8,
        top_k=[0, 0, 40, 0] * 8,
        top_p=[1.0, 1.0, 0.9, 1.0] * 8,
        min_p=[0.0, 0.0, 0.0, 0.05] * 8,
        seed=seeds,
        position=seeds,
        device=draw.device,
    )
    return [form.sample_tokens(draw(32, v, scale=3.0), rows).double()]
