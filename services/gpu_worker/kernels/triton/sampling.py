"""Draws a token for each row without sorting its logits; twin in `kernels/sampling.py`.

A row's filters leave a prefix of its tokens by falling probability, so all that the draw needs of them is the
prefix's mass. Where the tokens in front reach some mass or number is found by halving the range of logits, 32
times, each time summing anew: over the likely tokens, which a first pass has put aside, where no filter reaches
beyond them, and else over the row. Nothing waits for the host. Masses are summed in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.gpu_worker.kernels import sampling
from services.gpu_worker.kernels.sampling import SamplingRows
from services.gpu_worker.kernels.triton.configure import configure
from services.gpu_worker.kernels.triton.rows import check_shape
from services.gpu_worker.kernels.triton.sizes import UnsupportedShape

BLOCK = 4096  # tokens that a program looks at at a time
CANDIDATES = 8192  # likely tokens of a row that there is room for
LEAST = tl.constexpr(1e-7)  # of the most likely token's probability, for a likely one
GREEDY_BELOW = tl.constexpr(sampling.GREEDY_BELOW)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _uniform(seed, position):
    """As `sampling.uniform`."""
    z = seed.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    z += (position + 1).to(tl.uint64, bitcast=True) * 0xD1B54A32D192ED03
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) >> 11).to(tl.float64) * (1.0 / (1 << 53))


@triton.jit
def _key(logits):
    """Integers in the order of the logits."""
    bits = logits.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _tile(row, start, size, best, temperature, BLOCK: tl.constexpr):
    """Keys and weights, the most likely token's being 1; weights are zero past the row's end."""
    tokens = start + tl.arange(0, BLOCK)
    logits = tl.load(row + tokens, mask=tokens < size, other=-INFINITY)
    weights = tl.exp(logits / temperature - best / temperature)
    return tokens, _key(logits), tl.where(tokens < size, weights, 0.0)


@triton.jit
def _sum_from(row, size, best, temperature, key, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Mass, or number, of the tokens whose keys are `key` or more."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        tokens, keys, weights = _tile(row, start, size, best, temperature, BLOCK)
        chosen = (keys >= key) & (tokens < size)
        if COUNT:
            total += chosen.to(tl.float64)
        else:
            total += tl.where(chosen, weights, 0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _put_aside(
    row, size, best, temperature, aside_ptr, ids_ptr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr
):
    """Copies the likely tokens' logits and ids, in their order. Returns their number, room or not, and mass."""
    count = tl.full((), 0, tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        tokens, _keys, weights = _tile(row, start, size, best, temperature, BLOCK)
        likely = weights >= LEAST
        place = count + tl.cumsum(likely.to(tl.int32), 0) - 1
        inside = likely & (place < CANDIDATES)
        tl.store(aside_ptr + place, tl.load(row + tokens, mask=inside, other=0.0), mask=inside)
        tl.store(ids_ptr + place, tokens, mask=inside)
        count += tl.sum(likely.to(tl.int32), 0)
        total += tl.where(likely, weights, 0.0).to(tl.float64)
    return count, tl.sum(total, 0)


@triton.jit
def _reach(
    row, size, best, temperature, limit, COUNT: tl.constexpr, OR_EQUAL: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key from which on tokens sum to more than `limit`, or to it; the sum of those above that key, and
    the sum with those that have it."""
    low = tl.full((), -(1 << 31), tl.int64)
    high = _key(best).to(tl.int64) + 1
    above, upto = tl.full((), 0.0, tl.float64), tl.full((), INFINITY, tl.float64)
    for _ in range(32):
        middle = (low + high) >> 1
        found = _sum_from(row, size, best, temperature, middle, COUNT, BLOCK)
        reached = (found > limit) | ((found == limit) & OR_EQUAL)
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
        upto = tl.where(reached, found, upto)
        above = tl.where(reached, above, found)
    return low, above, upto


@triton.jit
def _weight_of(key, best, temperature):
    """Of every token that has this key, in float64."""
    bits = key.to(tl.int32)
    logit = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.exp(logit / temperature - best / temperature).to(tl.float64)


@triton.jit
def _kept_mass(row, size, best, temperature, total, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """What the filters leave: top-k first, of that top-p, then min-p; at least the most likely token."""
    kept = total
    if (top_k > 0) & (top_k < size):
        key, count, _upto = _reach(row, size, best, temperature, top_k.to(tl.float64), True, True, BLOCK)
        above = _sum_from(row, size, best, temperature, key + 1, False, BLOCK)
        kept = above + (top_k.to(tl.float64) - count) * _weight_of(key, best, temperature)
    most = kept
    if top_p < 1:
        limit = top_p.to(tl.float64) * kept
        key, above, upto = _reach(row, size, best, temperature, limit, False, True, BLOCK)
        weight = _weight_of(key, best, temperature)
        some = above + tl.ceil((limit - above) / weight) * weight  # of those with the last key
        most = tl.minimum(kept, tl.minimum(upto, some))
    if min_p > 0:
        mass = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, size, BLOCK):
            _tokens, _keys, weights = _tile(row, start, size, best, temperature, BLOCK)
            mass += tl.where(weights >= min_p, weights, 0.0).to(tl.float64)
        most = tl.minimum(most, tl.sum(mass, 0))
    return tl.maximum(most, 1.0)


@triton.jit
def _walk_falling(row, size, best, temperature, target, BLOCK: tl.constexpr):
    """The token at which the mass, by falling probability, passes the target; -1 where rounding leaves none. Equal
    ones stand by their number."""
    key, above, _upto = _reach(row, size, best, temperature, target, False, False, BLOCK)
    wanted = tl.floor((target - above) / _weight_of(key, best, temperature)).to(tl.int32)
    seen = tl.full((), 0, tl.int32)
    found = tl.full((), -1, tl.int32)
    for start in range(0, size, BLOCK):
        tokens, keys, _weights = _tile(row, start, size, best, temperature, BLOCK)
        equal = ((keys == key) & (tokens < size)).to(tl.int32)
        rank = seen + tl.cumsum(equal, 0) - 1
        found = tl.maximum(found, tl.max(tl.where((equal > 0) & (rank <= wanted), tokens, -1), 0))
        seen += tl.sum(equal, 0)
    return found


@triton.jit
def _walk(row, size, best, temperature, target, fallback, BLOCK: tl.constexpr):
    """The token at which the mass, in the vocabulary's order, passes the target."""
    seen = tl.full((), 0.0, tl.float64)
    found = size
    for start in range(0, size, BLOCK):
        tokens, _, weights = _tile(row, start, size, best, temperature, BLOCK)
        mass = seen + tl.cumsum(weights.to(tl.float64), 0)
        found = tl.minimum(found, tl.min(tl.where((mass > target) & (tokens < size), tokens, size), 0))
        seen = tl.max(mass, 0)
    return tl.where(found < size, found, fallback)


@triton.jit
def _sample_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    tokens_ptr,
    aside_ptr,
    ids_ptr,
    size,
    logits_stride,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row a program."""
    program = tl.program_id(0)
    row = logits_ptr + program.to(tl.int64) * logits_stride
    best, token = tl.full((), -INFINITY, tl.float32), tl.full((), 0, tl.int32)
    for start in range(0, size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        top, index = tl.max(
            tl.load(row + tokens, mask=tokens < size, other=-INFINITY), 0, return_indices=True
        )
        token = tl.where(top > best, start + index, token).to(tl.int32)
        best = tl.maximum(best, top)
    temperature = tl.load(temperature_ptr + program)
    if (temperature > GREEDY_BELOW) & (best > -INFINITY) & (best < INFINITY):
        total = _sum_from(row, size, best, temperature, -(1 << 31), False, BLOCK)
        top_k, top_p = tl.load(top_k_ptr + program), tl.load(top_p_ptr + program)
        min_p = tl.load(min_p_ptr + program)
        draw = _uniform(tl.load(seed_ptr + program), tl.load(position_ptr + program))
        if (top_k > 0) | (top_p < 1) | (min_p > 0):
            aside, ids = aside_ptr + program * CANDIDATES, ids_ptr + program * CANDIDATES
            count, mass = _put_aside(row, size, best, temperature, aside, ids, CANDIDATES, BLOCK)
            by_mass = (top_p < 1) & (mass > top_p.to(tl.float64) * total * (1 + 1e-9))
            by_number = count > top_k
            confined = by_number & ((top_k > 0) | by_mass | ((top_p >= 1) & (min_p >= LEAST)))
            confined = confined & (count <= CANDIDATES)
            if confined:
                tl.debug_barrier()  # other threads read what this one has put aside
                row, size = aside, count
            mass = _kept_mass(row, size, best, temperature, total, top_k, top_p, min_p, BLOCK)
            drawn = _walk_falling(row, size, best, temperature, draw * mass, BLOCK)
            if confined & (drawn >= 0):
                drawn = tl.load(ids + drawn)
            token = tl.where(drawn < 0, token, drawn)
        else:
            token = _walk(row, size, best, temperature, draw * total, token, BLOCK)
    tl.store(tokens_ptr + program, token.to(tl.int64))


def sample_tokens(logits: Tensor, rows: SamplingRows) -> Tensor:
    """int64 [R] of float32 `logits` [R, V]. A row whose largest logit is not finite gets some token."""
    if logits.ndim != 2 or logits.dtype != torch.float32 or not logits.shape[1]:
        raise UnsupportedShape(f"logits {list(logits.shape)} are {logits.dtype} and not float32 [R, V]")
    num_rows, size = logits.shape
    values = rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seed, rows.position
    for name, value in zip(SamplingRows.__dataclass_fields__, values, strict=True):
        check_shape(name, value, (num_rows,))
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    block = min(BLOCK, max(16, triton.next_power_of_2(size)))
    if num_rows:
        room = num_rows, CANDIDATES
        aside = torch.empty(room, dtype=torch.float32, device=logits.device)
        ids = torch.empty(room, dtype=torch.int32, device=logits.device)
        _sample_kernel[(num_rows,)](
            logits, *values, tokens, aside, ids, size, logits.stride(0),
            CANDIDATES=CANDIDATES, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return tokens


CONFIGURATIONS = [
    configure(
        "sample_tokens",
        _sample_kernel,
        {"CANDIDATES": CANDIDATES, "BLOCK": BLOCK},
        torch.float32,
        num_warps=8,
        types={
            "top_k_ptr": torch.int32,
            "seed_ptr": torch.int64,
            "position_ptr": torch.int64,
            "tokens_ptr": torch.int64,
            "ids_ptr": torch.int32,
        },
    )
]
