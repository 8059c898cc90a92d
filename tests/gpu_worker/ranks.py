"""What each rank of a tensor-parallel test computes, in processes of its own that talk over gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn.functional import silu

from services.gpu_worker.compiler.parallel_sites import Operation, Site
from services.gpu_worker.compiler.parallelize import compositions
from services.gpu_worker.model.layouts import (
    COLUMN,
    INSIDE,
    LINEAR,
    ROW,
    STREAM,
    Attachment,
    Composition,
    Split,
    State,
)
from services.gpu_worker.model.parallel import Group, rank_major_rows
from services.gpu_worker.model.parallel_lora import lora_backward, lora_forward, reduce_gradients_

ROWS, INPUTS, RANK, OUTPUTS = 7, 16, 3, 8  # tokens that no group shares evenly
BLOCKS = (8, 4, 4)  # rows of a fused linear's projections
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
ATTACHMENTS = {"column": COLUMN, "row": ROW, "inside": INSIDE, "stream": STREAM}


def on_ranks(compute: Callable[[Group], Any], size: int) -> list[Any]:
    """What `compute`, a function of a module, returns on each of `size` new processes."""
    with tempfile.TemporaryDirectory(prefix="flexllm-ranks-") as folder:
        torch.multiprocessing.spawn(_rank, (compute, size, Path(folder)), nprocs=size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, compute: Callable[[Group], Any], size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        torch.save(compute(Group(dist.group.WORLD)), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def lora_compositions(attachment: Attachment, inputs: int, outputs: int, size: int) -> list[Composition]:
    pair = (
        Operation("A", LINEAR, inputs, RANK, inputs * RANK),
        Operation("B", LINEAR, RANK, outputs, RANK * outputs),
    )
    return list(compositions(Site("lora", (), attachment, pair), size))


def cases(size: int) -> dict[str, Composition]:
    """Every legal composition of LoRA at every attachment, with each of its adjoints."""
    return {
        f"{name} {composition.name} #{number}": composition
        for name, attachment in ATTACHMENTS.items()
        for number, composition in enumerate(lora_compositions(attachment, INPUTS, OUTPUTS, size))
    }


def lora_tensors(dtype: torch.dtype, outputs: int = OUTPUTS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (ROWS, INPUTS), "a": (RANK, INPUTS), "b": (outputs, RANK), "dy": (ROWS, outputs)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def local(x: Tensor, state: State, group: Group) -> Tensor:
    return group.part(x, 1).contiguous() if state is State.FEATURES else x


def local_weight(w: Tensor, split: Split | None, group: Group) -> Tensor:
    return w if split is None else group.part(w, split).contiguous()


def lora_in_every_layout(group: Group) -> dict[Any, dict[str, Tensor]]:
    return {
        (name, dtype): run_lora(composition, lora_tensors(dtype), group)
        for name, composition in cases(group.size).items()
        for dtype in DTYPES
    }


def run_lora(composition: Composition, full: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Two windows of the same rows, so that gradients accumulate, and the sums of a step."""
    first, second = composition.rules
    x = local(full["x"], composition.forward[0].source, group)
    dy = local(full["dy"], composition.backward[0].source, group)
    a, b = local_weight(full["a"], first.split, group), local_weight(full["b"], second.split, group)
    sums = torch.promote_types(full["x"].dtype, torch.float32)
    grads = (a.new_zeros(a.shape, dtype=sums), b.new_zeros(b.shape, dtype=sums))
    for _ in range(2):
        y, kept = lora_forward(composition, x, a, b, group)
        dx = lora_backward(composition, dy, kept, a, b, grads, group)
    reduce_gradients_(composition, grads, group)
    return {"y": y.clone(), "dx": dx.clone(), "da": grads[0], "db": grads[1]}


def lora_of_a_fused_linear(group: Group) -> dict[str, dict[str, Tensor]]:
    """Beside a column-parallel linear of several projections; `b` and `dy` in rank-major order."""
    full = lora_tensors(torch.float64, sum(BLOCKS))
    order = rank_major_rows(BLOCKS, group.size)
    full["b"], full["dy"] = full["b"][order], full["dy"][:, order]
    found = lora_compositions(COLUMN, INPUTS, sum(BLOCKS), group.size)
    return {composition.name: run_lora(composition, full, group) for composition in found}


def feed_forward_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "x": (ROWS, INPUTS),
        "up": (OUTPUTS, INPUTS),
        "up_a": (RANK, INPUTS),
        "up_b": (OUTPUTS, RANK),
        "down": (INPUTS, OUTPUTS),
        "down_a": (RANK, OUTPUTS),
        "down_b": (INPUTS, RANK),
        "dy": (ROWS, INPUTS),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def feed_forward_in_every_layout(group: Group) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Whole results, gathered from the ranks, by the forms of the two bypasses."""
    found = {}
    for up in lora_compositions(COLUMN, INPUTS, OUTPUTS, group.size):
        for down in lora_compositions(ROW, OUTPUTS, INPUTS, group.size):
            found[up.name, down.name] = feed_forward(up, down, feed_forward_tensors(), group)
    return found


def feed_forward(
    up: Composition, down: Composition, full: dict[str, Tensor], group: Group
) -> dict[str, Tensor]:
    """Forward and backward of `down(silu(up(x)))` as Megatron divides it, with a bypass beside each linear."""
    w_up, w_down = group.part(full["up"], 0), group.part(full["down"], 1)
    names = {"up": up, "down": down}
    weights = {
        name: [
            local_weight(full[f"{name}_{letter}"], rule.split, group)
            for letter, rule in zip("ab", composition.rules, strict=True)
        ]
        for name, composition in names.items()
    }
    grads = {name: (torch.zeros_like(a), torch.zeros_like(b)) for name, (a, b) in weights.items()}

    added, kept_up = lora_forward(up, full["x"], *weights["up"], group)
    hidden = full["x"] @ w_up.T + added
    gated = silu(hidden)
    added, kept_down = lora_forward(down, gated, *weights["down"], group)
    y = group.all_reduce_(gated @ w_down.T + added)

    dy = full["dy"]
    d_gated = dy @ w_down + lora_backward(down, dy, kept_down, *weights["down"], grads["down"], group)
    sigmoid = hidden.sigmoid()
    d_hidden = d_gated * sigmoid * (1 + hidden * (1 - sigmoid))
    added = lora_backward(up, d_hidden, kept_up, *weights["up"], grads["up"], group)
    found = {"y": y, "dx": group.all_reduce_(d_hidden @ w_up + added)}
    for name, composition in names.items():
        reduce_gradients_(composition, grads[name], group)
        for letter, rule, grad in zip("ab", composition.rules, grads[name], strict=True):
            total = full[f"{name}_{letter}"].shape[rule.split or 0]
            whole = grad if rule.split is None else group.all_gather(grad, rule.split, total)
            found[f"d{name}_{letter}"] = whole
    return found


def every_collective(group: Group) -> dict[Any, Tensor]:
    """Of 5 x 6 and 8 x 8 tensors that differ from rank to rank, by (method, dtype, rows)."""
    found: dict[Any, Tensor] = {}
    for dtype in DTYPES:
        for shape in ((5, 6), (8, 8), (1, 8)):
            x = numbered(group.rank, shape, dtype)
            key = (dtype, shape)
            found["all_reduce", *key] = group.all_reduce_(x.clone())
            found["broadcast", *key] = group.broadcast_(x.clone(), group.size - 1)
            for dim in (0, 1):
                mine = group.part(x, dim)
                found[f"all_gather {dim}", *key] = group.all_gather(mine, dim, shape[dim])
                found[f"reduce_scatter {dim}", *key] = group.reduce_scatter(x, dim)
                found[f"pad {dim}", *key] = group.pad(mine, dim, shape[dim])
                found[f"all_to_all {dim}", *key] = group.all_to_all(mine, 1 - dim, dim, shape[dim])
            found["untouched", *key] = x
    return found


def numbered(rank: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (torch.arange(shape[0] * shape[1], dtype=dtype).view(shape) + 3 * rank).contiguous()


def everything(group: Group) -> dict[str, Any]:
    """One start of the processes for all checks."""
    return {
        "collectives": every_collective(group),
        "lora": lora_in_every_layout(group),
        "fused": lora_of_a_fused_linear(group),
        "feed_forward": feed_forward_in_every_layout(group),
    }
