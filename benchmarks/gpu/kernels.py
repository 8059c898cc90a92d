"""Every kernel against float64, on shapes of real models: relative errors of the norm, the torch twin's beside."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Row
from services.gpu_worker.kernels import adamw as plain_adamw
from services.gpu_worker.kernels import cross_entropy as plain_cross_entropy
from services.gpu_worker.kernels import kv_cache as plain_cache
from services.gpu_worker.kernels import lora as plain_lora
from services.gpu_worker.kernels import norm_rope as plain_rows
from services.gpu_worker.kernels import paged_attention as plain_attention
from services.gpu_worker.kernels import paged_attention_backward as plain_backward
from services.gpu_worker.kernels import sampling as plain_sampling
from services.gpu_worker.kernels.adamw import AdamW
from services.gpu_worker.kernels.bypass import BlockGradient
from services.gpu_worker.kernels.linear import DenseLinear
from services.gpu_worker.kernels.lora import LoraRun, LoraRuns
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.kernels.paged_attention import PagedBatch, Run
from services.gpu_worker.kernels.sampling import SamplingRows

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
TRITON = "services.gpu_worker.kernels.triton"
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
    """`call(form, numbers)` runs one of two modules with the same functions; what it gives is compared."""

    name: str
    shape: str
    plain: ModuleType
    triton: str  # its twin's name
    call: Callable[[Any, Numbers], Outputs]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


def kernels(bench: Bench) -> Iterator[Row]:
    """A kernel that cannot be run at all fails by itself."""
    runs, is_interpreted = _triton_runs(bench.device)
    for check in checks(bench):
        for dtype in check.dtypes:
            if is_interpreted and dtype == torch.bfloat16:
                continue  # the interpreter computes it wrong
            yield result_of(check, dtype, bench.device, runs)


def _triton_runs(device: torch.device) -> tuple[bool, bool]:
    """Whether Triton's kernels can run here, and whether they are interpreted."""
    if importlib.util.find_spec("triton") is None:
        return False, False
    import triton

    is_interpreted = bool(triton.knobs.runtime.interpret)
    return is_interpreted or device.type == "cuda", is_interpreted


def result_of(check: Check, dtype: torch.dtype, device: torch.device, runs: bool) -> Row:
    """`runs`: Triton's kernels do."""
    row: Row = {"kernel": check.name, "shape": check.shape, "dtype": str(dtype).removeprefix("torch.")}
    exact = check.call(check.plain, Numbers(dtype, torch.float64, device))
    twin = relative_error(check.call(check.plain, Numbers(dtype, dtype, device)), exact)
    error, problem = None, None
    if runs:
        try:
            form = import_module(f"{TRITON}.{check.triton}")
            error = relative_error(check.call(form, Numbers(dtype, dtype, device)), exact)
        except Exception as raised:
            problem = f"{type(raised).__name__}: {raised}"
            print(f"  {check.name} {row['dtype']} {check.shape}: {problem}")
    judged = twin if not runs else error
    ok = judged is not None and judged < LIMITS[dtype]
    return row | {"triton": error, "torch": twin, "limit": LIMITS[dtype], "ok": ok, "problem": problem}


def relative_error(found: Outputs, exact: Outputs) -> float:
    """The worst of the outputs' norms of the difference over those of the exact values. Raises ArithmeticError for
    what is no number."""
    pairs = zip(found, exact, strict=True)
    errors = [float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs]
    if not all(map(math.isfinite, errors)):
        raise ArithmeticError(f"errors of {errors}: not all results are numbers")
    return max(errors)


# --- the checks


def checks(bench: Bench) -> Iterator[Check]:
    """Attention as the model has it first, of other numbers of heads at the end."""
    scale, config = bench.scale, bench.weights.config
    n, d, f, e = scale.kernel_rows, config.hidden_size, config.intermediate_size, scale.head_dim
    v, group, rows = scale.kernel_vocabulary, config.num_heads // config.num_kv_heads, f"{n} x {d}"
    yield Check("rms_norm", rows, plain_rows, "norm_rope", partial(_norm, n, d))
    yield Check("silu_mul", f"{n} x {f}", plain_rows, "activation", partial(_silu, n, f))
    yield from _attention_checks(n, (config.num_kv_heads, group, e))
    yield Check("rope", f"{n} x 8 x {e}", plain_rows, "norm_rope", partial(_rope, n, e))
    yield Check("rope_cache_write", f"{n} x 8 x {e}", plain_cache, "kv_cache", partial(_cache, n, e))
    yield Check("lora", f"{rows}, ranks 8 to 64", plain_lora, "lora", partial(_lora, n, d))
    loss = partial(_loss, n, d, v)
    yield Check("cross_entropy", f"{rows}, {v} tokens", plain_cross_entropy, "cross_entropy", loss)
    adamw = partial(_adamw, 100 * n)
    yield Check("adamw", str(100 * n), plain_adamw, "adamw", adamw, (torch.float32,))
    sample = partial(_sample, v)
    yield Check("sample_tokens", f"32 x {v}", plain_sampling, "sampling", sample, (torch.float32,))
    for other in scale.groups:
        if other != group:
            yield from _attention_checks(n, (config.num_kv_heads, other, e))


def _attention_checks(n: int, heads: Heads) -> Iterator[Check]:
    shape = f"{n} x {heads[0]} x {heads[1]} x {heads[2]}"
    yield Check("paged_attention", shape, plain_attention, "attention", partial(_attend, n, heads))
    backward = partial(_attend_backward, n, heads)
    yield Check("paged_attention_backward", shape, plain_backward, "attention_backward", backward)


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
    out, lse = plain_attention.paged_attention(q, keys, values, batch)
    dk, dv = (draw.zeros(heads[0], n, heads[2]) for _ in range(2))
    d_out = draw(*out.shape)
    return form.paged_attention_backward(d_out, q, keys, values, out, lse, batch, dk, dv), dk, dv


def _lora(n: int, d: int, form: Any, draw: Numbers) -> Outputs:
    """Runs of one row and of many, forward and backward."""
    ends = sorted({1, 2, n // 3, n // 2, n - 1})
    runs, start = [], 0
    for end, rank in zip(ends, (8, 16, 64, 16, 8), strict=False):
        a, b = draw(rank, d, scale=d**-0.5), draw(d, rank, scale=rank**-0.5)
        block = BlockGradient(slice(0, d), slice(0, rank), 2.0, draw.zeros(d, rank))
        runs.append(LoraRun(start, end, a, b, draw.zeros(rank, d), (block,)))
        start = end
    own, x, y, dy, dx = LoraRuns(runs), draw(n, d), draw(n, d), draw(n, d), draw(n, d)
    low = form.lora_shrink(x, own)
    form.lora_expand_(y, low, own)
    form.lora_backward_(dx, dy, x, low, own)
    gradients = [(run.grad_a, run.grad_b[0].grad) for run in runs if run.grad_a is not None]
    return low, y, dx, *(tensor for pair in gradients for tensor in pair)


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
    rows, kinds = (
        range(32),
        ((0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 40, 0.9, 0.0), (1.0, 0, 1.0, 0.05)),
    )
    filters = [list(column) for column in zip(*(kinds[i % 4] for i in rows), strict=True)]
    sampling = SamplingRows.make(*filters, list(rows), list(rows), draw.device)  # type: ignore[arg-type]
    return [form.sample_tokens(draw(32, v, scale=3.0), sampling).double()]
