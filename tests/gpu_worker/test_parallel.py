"""Ranks that share a model: collectives, bypasses in every layout, and which part of a checkpoint is whose."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from services.gpu_worker.model.config import ModelConfig, UnsupportedModel
from services.gpu_worker.model.layouts import Composition, State
from services.gpu_worker.model.parallel import (
    Group,
    rank_major_rows,
    read_shard,
    shard_config,
    shard_of,
    share,
)
from tests.builders import make_tiny_model
from tests.gpu_worker.ranks import (
    BLOCKS,
    DTYPES,
    cases,
    every_collective,
    everything,
    feed_forward_tensors,
    lora_tensors,
    numbered,
    on_ranks,
    run_lora,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}
SHAPES = ((5, 6), (8, 8), (1, 8))


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} ranks")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each of the processes computed."""
    return on_ranks(everything, request.param)


def results(ranks: list[dict[str, Any]], kind: str, key: object) -> list[Any]:
    return [rank[kind][key] for rank in ranks]


def assembled(parts: list[Tensor], state: State) -> Tensor:
    """The logical tensor of what the ranks hold."""
    if state is State.FEATURES:
        return torch.cat(parts, 1)
    if state is State.PARTIAL:
        return torch.stack([part.double() for part in parts]).sum(0)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


def assembled_weight(parts: list[Tensor], split: int | None) -> Tensor:
    return assembled(parts, State.REPLICATED) if split is None else torch.cat(parts, split)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def by_autograd(full: dict[str, Tensor]) -> dict[str, Tensor]:
    """One process, float64; the gradients of `a` and `b` over two equal windows."""
    x, a, b = (full[name].double().requires_grad_() for name in "xab")
    y = x @ a.T @ b.T
    dx, da, db = torch.autograd.grad(y, (x, a, b), full["dy"].double())
    return {"y": y.detach(), "dx": dx, "da": 2 * da, "db": 2 * db}


def check_lora(parts: list[dict[str, Tensor]], composition: Composition, full: dict[str, Tensor]) -> None:
    first, second = composition.rules
    found = {
        "y": assembled([part["y"] for part in parts], composition.forward[-1].target),
        "dx": assembled([part["dx"] for part in parts], composition.backward[-1].target),
        "da": assembled_weight([part["da"] for part in parts], first.split),
        "db": assembled_weight([part["db"] for part in parts], second.split),
    }
    for name, expected in by_autograd(full).items():
        error = relative_error(found[name], expected)
        assert error < TOLERANCE[full["x"].dtype], (composition.name, name, error)


def feed_forward_by_autograd() -> dict[str, Tensor]:
    full = {name: tensor.requires_grad_() for name, tensor in feed_forward_tensors().items()}
    hidden = full["x"] @ full["up"].T + full["x"] @ full["up_a"].T @ full["up_b"].T
    gated = torch.nn.functional.silu(hidden)
    y = gated @ full["down"].T + gated @ full["down_a"].T @ full["down_b"].T
    names = ["x", "up_a", "up_b", "down_a", "down_b"]
    grads = torch.autograd.grad(y, [full[name] for name in names], full["dy"])
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_in_every_layout_equals_one_process(ranks: list[dict[str, Any]], dtype: torch.dtype) -> None:
    found = cases(len(ranks))
    assert {name.split(" #")[0] for name in found} >= {
        *(f"column {forms}" for forms in ("①+④", "②+④", "③+③", "③+④")),
        *(f"row {forms}" for forms in ("②+①", "②+④", "②+③", "③+③", "①+④")),
        *(f"inside {forms}" for forms in ("①+④", "②+④")),
        *(f"stream {forms}" for forms in ("①+①", "②+①", "①+④", "③+①", "③+③")),
    }
    for name, composition in found.items():
        check_lora(results(ranks, "lora", (name, dtype)), composition, lora_tensors(dtype))


def test_a_rank_alone_computes_the_plain_bypass() -> None:
    (name,) = {composition.name for composition in cases(1).values()}
    composition = next(iter(cases(1).values()))
    full = lora_tensors(torch.float64)
    assert name == "①+①"
    check_lora([run_lora(composition, full, Group())], composition, full)


def test_a_fused_linears_projections_are_each_divided(ranks: list[dict[str, Any]]) -> None:
    """Every rank's columns of the output are its parts of q, k and v, in that order."""
    full = lora_tensors(torch.float64, sum(BLOCKS))
    expected = by_autograd(full)
    size, q, k = len(ranks), BLOCKS[0], BLOCKS[0] + BLOCKS[1]
    blocks = [expected["y"][:, columns] for columns in (slice(0, q), slice(q, k), slice(k, None))]
    for forms in ("①+④", "②+④", "③+③", "③+④"):
        for rank, part in enumerate(results(ranks, "fused", forms)):
            mine = torch.cat([block.chunk(size, 1)[rank] for block in blocks], 1)
            assert relative_error(part["y"], mine) < 1e-12, forms


def test_bypasses_ride_in_the_all_reduces_of_a_tensor_parallel_feed_forward(
    ranks: list[dict[str, Any]],
) -> None:
    """Column-parallel, silu, row-parallel, each with LoRA: two all-reduces are the backbone's own."""
    expected = feed_forward_by_autograd()
    for forms, first in ranks[0]["feed_forward"].items():
        assert first.keys() == expected.keys()
        for name, value in expected.items():
            for rank in ranks:
                assert relative_error(rank["feed_forward"][forms][name], value) < 1e-12, (forms, name)
    assert len(ranks[0]["feed_forward"]) == 4 * 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_collectives_give_what_they_are_named_for(
    ranks: list[dict[str, Any]], dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    size = len(ranks)
    inputs = [numbered(rank, shape, dtype) for rank in range(size)]
    total = torch.stack(inputs).sum(0)
    found = {
        name: results(ranks, "collectives", (name, dtype, shape))
        for name, *key in ranks[0]["collectives"]
        if key == [dtype, shape]
    }
    for rank in range(size):
        assert torch.equal(found["all_reduce"][rank], total)
        assert torch.equal(found["broadcast"][rank], inputs[-1])
        assert torch.equal(found["untouched"][rank], inputs[rank])
    for dim in (0, 1):
        bounds = [share(shape[dim], rank, size) for rank in range(size)]
        pieces = [x.narrow(dim, start, end - start) for x, (start, end) in zip(inputs, bounds, strict=True)]
        joined = torch.cat(pieces, dim)
        assert torch.equal(torch.stack(found[f"pad {dim}"]).sum(0), joined)
        for rank in range(size):
            start, end = bounds[rank]
            across = share(shape[1 - dim], rank, size)
            assert torch.equal(found[f"all_gather {dim}"][rank], joined)
            assert torch.equal(found[f"reduce_scatter {dim}"][rank], total.narrow(dim, start, end - start))
            mine = joined.narrow(1 - dim, across[0], across[1] - across[0])
            assert torch.equal(found[f"all_to_all {dim}"][rank], mine)


def test_a_group_of_one_gives_back_what_it_got() -> None:
    for (name, dtype, shape), x in every_collective(Group()).items():
        assert torch.equal(x, numbered(0, shape, dtype)), name


def test_shares_cover_a_dimension_without_gaps() -> None:
    for total in (0, 1, 7, 8):
        bounds = [share(total, rank, 3) for rank in range(3)]
        assert bounds[0][0] == 0 and bounds[-1][1] == total
        assert all(left[1] == right[0] for left, right in pairwise(bounds))


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / request.param, request.param, tied=False)


def test_the_shards_of_a_checkpoint_make_it_whole(model_dir: Path) -> None:
    config = ModelConfig.from_folder(model_dir)
    by_columns = {"o_proj": 1, "down_proj": 1}
    divided = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"}
    with safe_open(model_dir / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a file is no dict
            parts = [read_shard(file, name, config, rank, 2) for rank in range(2)]
            module = name.split(".")[-2]
            whole = file.get_tensor(name)
            if module in divided:
                assert torch.equal(torch.cat(parts, by_columns.get(module, 0)), whole), name
                assert parts[0].shape == parts[1].shape != whole.shape
            else:
                assert torch.equal(parts[0], whole) and torch.equal(parts[1], whole), name


def test_a_ranks_shards_have_the_shapes_of_its_configuration(model_dir: Path) -> None:
    config = ModelConfig.from_folder(model_dir)
    mine = shard_config(config, 2)
    assert (mine.q_size, mine.kv_size, mine.intermediate_size) == (32, 16, 64)
    assert mine.hidden_size == config.hidden_size
    expected = {
        "self_attn.q_proj": (mine.q_size, 64),
        "self_attn.k_proj": (mine.kv_size, 64),
        "self_attn.o_proj": (64, mine.q_size),
        "mlp.gate_proj": (mine.intermediate_size, 64),
        "mlp.down_proj": (64, mine.intermediate_size),
    }
    with safe_open(model_dir / "model.safetensors", framework="pt") as file:
        for path, shape in expected.items():
            assert read_shard(file, f"model.layers.1.{path}.weight", config, 1, 2).shape == shape


def test_one_rank_holds_everything(model_dir: Path) -> None:
    config = ModelConfig.from_folder(model_dir)
    assert shard_config(config, 1) == config
    assert shard_of("model.layers.0.self_attn.q_proj.weight", config, 0, 1) is None


def test_heads_that_ranks_cannot_share_are_refused(model_dir: Path) -> None:
    config = ModelConfig.from_folder(model_dir)
    with pytest.raises(UnsupportedModel, match="4 ranks: they cannot share 2 key/value heads evenly"):
        shard_config(config, 4)
    with pytest.raises(UnsupportedModel, match="cannot share 128 features"):
        shard_config(replace(config, num_heads=6, num_kv_heads=3), 3)


def test_rank_major_order_makes_each_ranks_part_one_slice() -> None:
    order = rank_major_rows((4, 2, 2), 2)
    assert order.tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert rank_major_rows((4, 2, 2), 1).tolist() == list(range(8))
