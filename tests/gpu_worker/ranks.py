"""What each rank of a tensor-parallel test computes, in processes of its own that talk over gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from services.gpu_worker.compiler.parallel_sites import bypass_sites
from services.gpu_worker.compiler.parallelize import compositions
from services.gpu_worker.compiler.programs import ForwardPrograms
from services.gpu_worker.engine.profile_cache import ProfileCache
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.kernels.attention import causal_mask
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.attention import GatheredAttention, PagedWindow, WindowPart
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.context import AdapterRun, ForwardContext
from services.gpu_worker.model.layouts import ONE_RANK, Composition, Layout
from services.gpu_worker.model.parallel import Group
from services.gpu_worker.model.peft import BottleneckConfig, LoraConfig, Method
from services.gpu_worker.model.transformer import Transformer
from tests.gpu_worker.engines import TARGETS
from tests.gpu_worker.training import advance, make_dataset, make_trainer, make_transformer
from tests.gpu_worker.virtual import make_latency, times

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LENGTHS = [5, 3]  # tokens of examples
WINDOWS = (5, 1, 3)  # that no group shares evenly, some shorter than it
ROWS = (1, 3, 6)  # of a served sequence


def on_ranks(compute: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """What `compute`, a function of a module, returns of its group and `args` on each of `size` new processes."""
    with tempfile.TemporaryDirectory(prefix="flexllm-ranks-") as folder:
        torch.multiprocessing.spawn(_rank, (compute, size, Path(folder), args), nprocs=size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, compute: Callable[..., Any], size: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        torch.save(compute(Group(dist.group.WORLD), *args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Case:
    """A method whose bypasses lie on the ranks as `layout` says."""

    method: Method
    layout: Layout
    dropout: float = 0.0


LORA = LoraConfig(3, 4.0, TARGETS)
METHODS: dict[str, Method] = {  # of all their layouts
    "lora": LORA,
    "serial": BottleneckConfig(3, TARGETS, "gelu", 0.7),
    "parallel": BottleneckConfig(3, TARGETS, "silu", 1.5, parallel=True),
}
OTHERS: dict[str, tuple[Method, float, int]] = {  # with dropout, of so many layouts
    "dora": (LoraConfig(3, 4.0, TARGETS, dora=True), 0.0, 4),
    "dropout": (LORA, 0.3, 2),
    "rslora": (LoraConfig(3, 4.0, TARGETS, rslora=True), 0.0, 2),
    "two of three": (LoraConfig(3, 4.0, ("q_proj", "v_proj", "up_proj")), 0.0, 3),
}


def cases(config: ModelConfig, tp: int) -> dict[str, Case]:
    """Every legal composition of every site, adjoints included; for two ranks some of rarer methods too."""
    found = {}
    for name, method in METHODS.items():
        for number, layout in enumerate(layouts(method, config, tp)):
            found[f"{name} #{number}"] = Case(method, layout)
    for name, (method, dropout, most) in OTHERS.items() if tp == 2 else ():
        for number, layout in enumerate(layouts(method, config, tp)[:most]):
            found[f"{name} #{number}"] = Case(method, layout, dropout)
    return found


def layouts(method: Method, config: ModelConfig, tp: int) -> list[Layout]:
    """As few as have every composition of every site in one of them."""
    options = {site.name: list(compositions(site, tp)) for site in bypass_sites(method, config)}
    number = max(map(len, options.values()))
    return [
        Layout(tp, {name: _nth(found, index, shift) for shift, (name, found) in enumerate(options.items())})
        for index in range(number)
    ]


def _nth(options: list[Composition], index: int, shift: int) -> Composition:
    """Sites with the same options do not all have the same one of them."""
    return options[(index + shift) % len(options)]


def run_case(case: Case, folder: Path, group: Group) -> tuple[dict[str, Any], AdapterWeights]:
    """A step of training in small windows, gathered whole, and the weights that would be served before it."""
    model = make_transformer(folder, torch.float64, group)
    layout = case.layout if group.size > 1 else ONE_RANK
    dataset = make_dataset(LENGTHS, model.config.vocab_size)
    config = JobConfig(batch_size=len(LENGTHS), lora_dropout=case.dropout, max_grad_norm=0.5)
    trainer = make_trainer(
        model, dataset, method=case.method, config=config, layout=layout, max_tokens_in_flight=16
    )
    parameters = trainer.parameters
    start = parameters.state()["masters"]
    generator = torch.Generator().manual_seed(1)
    start += torch.randn(start.shape, generator=generator, dtype=start.dtype) * 0.2
    parameters.load_state({"masters": start})
    served = AdapterWeights(model.weights, case.method, layout)
    served.load(parameters.masters)
    sizes = cycle(WINDOWS)
    advance(trainer, lambda: next(sizes))
    report = trainer.optimizer_step()
    state = parameters.state()
    return {
        "loss": torch.tensor(report.train_loss),
        "norm": torch.tensor(report.grad_norm),
        "gradients": state["exp_avg"],
        "masters": state["masters"],
    }, served


def serve_together(model: Transformer, adapters: list[AdapterWeights]) -> Tensor:
    """Hidden states of a sequence for each adapter and between them of some for the base model."""
    config, weights = model.config, model.weights
    runs: list[AdapterRun] = []
    windows, blocks, positions = [], [], []
    cache = KVCache(
        config.num_layers, 2 * len(adapters), max(ROWS), config.num_kv_heads, config.head_dim,
        weights.dtype, weights.device,
    )  # fmt: skip
    users: Iterator[AdapterWeights | None] = (user for pair in zip(adapters, cycle([None])) for user in pair)
    for block, (user, rows) in enumerate(zip(users, cycle(ROWS), strict=False)):
        span = slice(len(positions), len(positions) + rows)
        mask = causal_mask(rows, rows, config.num_heads // config.num_kv_heads, weights.dtype, weights.device)
        windows.append(PagedWindow(cache.pages([[block]]), [WindowPart(span, slice(0, rows), mask)]))
        blocks += [block] * rows
        positions += range(rows)
        if user is not None:
            runs.append(AdapterRun(span.start, span.stop, user))
    sites = frozenset().union(*(run.weights.sites for run in runs))
    context = ForwardContext(
        positions=torch.tensor(positions),
        slots=cache.slots(blocks, positions),
        program=ForwardPrograms(weights.whole, weights.group.size).get(sites, frozenset()),
        attention=GatheredAttention(windows),
        adapters=runs,
    )
    tokens = torch.arange(len(positions)) * 7 % config.vocab_size
    return model.forward(tokens, cache, context)


def run_cases(group: Group, folder: Path, tp: int) -> dict[str, dict[str, Any]]:
    """By the names of the cases for `tp` ranks; the adapters of all share one served batch."""
    found, adapters = {}, []
    for name, case in cases(ModelConfig.from_folder(folder), tp).items():
        found[name], served = run_case(case, folder, group)
        adapters.append(served)
    hidden = serve_together(make_transformer(folder, torch.float64, group), adapters)
    return {**found, "served": {"hidden": hidden}}


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


def kept_profile(group: Group, folder: Path) -> list[float] | None:
    """Of the latency model that is read back; ranks other than 0 look for a file that is not there."""
    cache = ProfileCache(folder if group.rank == 0 else folder / "elsewhere", {"ranks": group.size})
    own = make_latency(1.0 + group.rank)
    cache.save(replace(own, decodes=own.forward), group)
    model = cache.load(group)
    return None if model is None else times(model)


def everything(group: Group, folder: Path, profiles: Path) -> dict[str, Any]:
    """One start of the processes for all checks."""
    cases = run_cases(group, folder, group.size)
    return {
        "collectives": every_collective(group),
        "cases": cases,
        "profile": kept_profile(group, profiles),
    }
