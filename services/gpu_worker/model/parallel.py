"""Tensor parallelism: the ranks that share a model, and which part of a checkpoint each of them holds.

Of a dimension that the ranks share, rank r holds [total * r // size, total * (r + 1) // size): tokens need not
divide evenly; heads and features do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.layouts import BACKBONE, COLUMN, Collective, Move, State, check_tensor_parallel
from services.gpu_worker.model.peft import projections

_DIM = {State.TOKENS: 0, State.FEATURES: 1}


def share(total: int, rank: int, size: int) -> tuple[int, int]:
    """Start and end of a rank's part of a dimension; parts differ by one at most."""
    return total * rank // size, total * (rank + 1) // size


class Group:
    """The ranks that share one model, over gloo on CPUs and NCCL on GPUs; `None` is one rank alone.

    Alone, every method returns its tensor. Every rank has to call the same methods in the same order.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._processes = process_group
        self.rank = 0 if process_group is None else process_group.rank()
        self.size = 1 if process_group is None else process_group.size()
        over_gpus = process_group is not None and dist.get_backend(process_group) == dist.Backend.NCCL
        self._device = torch.device("cuda" if over_gpus else "cpu")  # NCCL sends what lies on a GPU
        # gloo's own reduce-scatter took up to 3.8 times as long as its all-reduce (1 to 16 MiB, 2 ranks)
        self._sums_first = process_group is not None and dist.get_backend(process_group) == dist.Backend.GLOO

    def share(self, total: int) -> tuple[int, int]:
        return share(total, self.rank, self.size)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's slice of what every rank has."""
        start, end = self.share(x.shape[dim])
        return x.narrow(dim, start, end - start)

    def pad(self, x: Tensor, dim: int, total: int) -> Tensor:
        """This rank's slice among zeros: its share of a sum over the ranks."""
        if self.size == 1:
            return x
        shape = list(x.shape)
        shape[dim] = total
        padded = x.new_zeros(shape)
        self.part(padded, dim).copy_(x)
        return padded

    def broadcast_(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrites a contiguous tensor with that of the rank `source` of this group."""
        if self.size > 1:
            dist.broadcast(x, group=self._processes, group_src=source)
        return x

    def all_reduce_(self, x: Tensor) -> Tensor:
        """The sum over the ranks of a contiguous tensor, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(x, group=self._processes)
        return x

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers: of what each of them could afford."""
        if self.size == 1:
            return number
        found = torch.tensor(number, dtype=torch.int64, device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._processes)
        return int(found)

    def first(self, number: float) -> float:
        """Rank 0's number: of what each of them has measured."""
        if self.size == 1:
            return number
        return float(self.broadcast_(torch.tensor(number, dtype=torch.float64, device=self._device)))

    def all_gather(self, x: Tensor, dim: int, total: int) -> Tensor:
        """Every rank's slice of a dimension of `total`, joined."""
        if self.size == 1:
            return x
        lengths = self._lengths(total)
        longest = max(lengths)  # gloo gathers equal sizes only
        if x.shape[dim] < longest:
            shape = list(x.shape)
            shape[dim] = longest - x.shape[dim]
            x = torch.cat([x, x.new_zeros(shape)], dim)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in lengths]
        dist.all_gather(parts, x, group=self._processes)
        return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's slice of the sum over the ranks."""
        if self.size == 1:
            return x
        if self._sums_first:
            return self.part(
                self.all_reduce_(x.clone(memory_format=torch.contiguous_format)), dim
            ).contiguous()
        parts = [part.contiguous() for part in x.split(self._lengths(x.shape[dim]), dim)]
        mine = torch.empty_like(parts[self.rank])
        dist.reduce_scatter(mine, parts, group=self._processes)
        return mine

    def all_to_all(self, x: Tensor, split_dim: int, join_dim: int, total: int) -> Tensor:
        """From slices of `join_dim`, which has `total` entries, to slices of `split_dim`."""
        if self.size == 1:
            return x
        sent = [part.reshape(-1) for part in x.split(self._lengths(x.shape[split_dim]), split_dim)]
        shapes = []
        for length in self._lengths(total):
            shape = list(self.part(x, split_dim).shape)
            shape[join_dim] = length
            shapes.append(torch.Size(shape))
        sizes = [shape.numel() for shape in shapes]
        received = x.new_empty(sum(sizes))
        dist.all_to_all_single(
            received, torch.cat(sent), sizes, [part.numel() for part in sent], self._processes
        )
        parts = zip(received.split(sizes), shapes, strict=True)
        return torch.cat([part.view(shape) for part, shape in parts], join_dim)

    def move(self, x: Tensor, step: Move, rows: int, width: int) -> Tensor:
        """Changes how a tensor of [rows, width] in all lies on the ranks. A sum happens in its place, where that is
        contiguous; nothing else writes to it, but the result may be a view of it.

        A fused linear's rows are in rank-major order where a move divides or joins them (`rank_major_rows`).
        """
        whole = {0: rows, 1: width}
        match step.collective:
            case Collective.KEEP:
                return x
            case Collective.PARTITION:
                return self.part(x, _DIM[step.target])
            case Collective.PAD:
                dim = _DIM[step.source]
                return self.pad(x, dim, whole[dim])
            case Collective.REPLICATE:
                return self.broadcast_(x)
            case Collective.ALL_GATHER:
                dim = _DIM[step.source]
                return self.all_gather(x, dim, whole[dim])
            case Collective.ALL_REDUCE:
                return self.all_reduce_(x.contiguous())
            case Collective.REDUCE_SCATTER:
                return self.reduce_scatter(x, _DIM[step.target])
            case Collective.ALL_TO_ALL:
                dim = _DIM[step.source]
                return self.all_to_all(x, _DIM[step.target], dim, whole[dim])

    def _lengths(self, total: int) -> list[int]:
        bounds = [share(total, rank, self.size) for rank in range(self.size)]
        return [end - start for start, end in bounds]


ALONE = Group()


def shard_config(config: ModelConfig, tp: int) -> ModelConfig:
    """What one of `tp` ranks computes with; raises UnsupportedModel where they cannot share it evenly."""
    check_tensor_parallel(config, tp)
    return replace(
        config,
        num_heads=config.num_heads // tp,
        num_kv_heads=config.num_kv_heads // tp,
        intermediate_size=config.intermediate_size // tp,
    )


@dataclass(frozen=True, slots=True)
class Shard:
    """Entries [start, end) of one dimension of a checkpoint's tensor."""

    dim: int
    start: int
    end: int


def shard_of(name: str, config: ModelConfig, rank: int, tp: int) -> Shard | None:
    """A rank's part of a Hugging Face tensor of the whole `config`; None: every rank has all of it.

    Linears behind a replicated input are divided by rows, a head's being neighbours; o and down by columns.
    """
    projection = projections(config).get(name.split(".")[-2])
    if tp == 1 or projection is None:
        return None
    if BACKBONE[projection.group] is COLUMN:
        return Shard(0, *share(projection.out_features, rank, tp))
    return Shard(1, *share(projection.in_features, rank, tp)) if name.endswith(".weight") else None


def read_shard(file: Any, name: str, config: ModelConfig, rank: int, tp: int) -> Tensor:
    """Reads only the rank's bytes of an open safetensors file."""
    shard = shard_of(name, config, rank, tp)
    if shard is None:
        whole: Tensor = file.get_tensor(name)
        return whole
    tensor = file.get_slice(name)
    rows = slice(shard.start, shard.end)
    part: Tensor = tensor[rows] if shard.dim == 0 else tensor[:, rows]
    return part


def rank_major_rows(blocks: Sequence[int], tp: int) -> Tensor:
    """Order of a fused linear's rows in which every rank's part is one slice: int64 [sum(blocks)].

    `blocks` are the rows of the projections, e.g. of q, k and v; a rank holds its part of each.
    """
    starts = [sum(blocks[:i]) for i in range(len(blocks))]
    order = [
        torch.arange(start + first, start + last)
        for rank in range(tp)
        for start, block in zip(starts, blocks, strict=True)
        for first, last in [share(block, rank, tp)]
    ]
    return torch.cat(order)
