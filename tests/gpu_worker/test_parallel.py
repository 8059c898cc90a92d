"""Ranks that share a model: collectives, programs of every layout, and which part of a checkpoint is whose."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.config import ModelConfig, UnsupportedModel
from services.gpu_worker.model.parallel import (
    ALONE,
    Group,
    rank_major_rows,
    read_shard,
    shard_config,
    shard_of,
    share,
)
from services.gpu_worker.model.peft import LoraConfig
from services.gpu_worker.ranks import open_engine
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import make_adapter, make_config, make_engine, prompt_of, run
from tests.gpu_worker.ranks import DTYPES, cases, every_collective, everything, numbered, on_ranks, run_cases
from tests.gpu_worker.training import make_dataset
from tests.gpu_worker.virtual import make_latency, times

TOLERANCE = 1e-10
SHAPES = ((5, 6), (8, 8), (1, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases of q, k and v, and heads for four ranks."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_model(path, "qwen2", num_heads=8, num_kv_heads=4, tied=False)


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} ranks")
def ranks(folder: Path, profiles: Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each of the processes computed."""
    return on_ranks(everything, request.param, folder, profiles)


def results(ranks: list[dict[str, Any]], kind: str, key: object) -> list[Any]:
    return [rank[kind][key] for rank in ranks]


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def test_every_layout_of_every_bypass_trains_and_serves_as_one_process_does(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    """Loss, gradients gathered whole, their norm, the parameters after a step, and a served batch of all."""
    alone = run_cases(ALONE, folder, len(ranks))
    for name, expected in alone.items():
        for values in results(ranks, "cases", name):
            assert values.keys() == expected.keys()
            for key, value in expected.items():
                assert relative_error(values[key], value) < TOLERANCE, (name, key)


def test_every_rank_has_the_latency_model_that_rank_0_reads(
    ranks: list[dict[str, Any]], profiles: Path
) -> None:
    assert all(rank["profile"] == times(make_latency()) for rank in ranks)
    assert not (profiles / "elsewhere").exists()


def test_the_cases_are_all_layouts_that_are_legal(folder: Path) -> None:
    config, found = ModelConfig.from_folder(folder), set[tuple[str, str, str]]()
    for name, case in cases(config, 2).items():
        kind = name.partition(" #")[0]
        found |= {(kind, site, c.name) for site, c in case.layout.compositions.items()}
    for kind, site, forms in (
        ("lora", "qkv", "①+④ ②+④ ③+③ ③+④"),
        ("lora", "gate_up", "①+④ ②+④ ③+③ ③+④"),
        ("lora", "o", "②+① ②+④ ②+③ ③+③ ①+④"),
        ("lora", "down", "②+① ②+④ ②+③ ③+③ ①+④"),
        ("serial", "k_proj", "①+④ ②+④"),
        ("serial", "down_proj", "①+① ②+① ①+④ ③+① ③+③"),
        ("parallel", "up_proj", "①+④ ②+④ ③+③ ③+④"),
        ("parallel", "o_proj", "②+① ①+①"),
    ):
        assert {c for k, s, c in found if (k, s) == (kind, site)} == set(forms.split())
    for kind in ("dora", "dropout", "rslora"):
        assert {c for k, s, c in found if (k, s) == (kind, "qkv")} >= {"①+④", "②+④"}


def serve_and_train(engine: Engine, method: LoraConfig) -> tuple[list[list[int]], list[tuple[float, float]]]:
    """Tokens of three requests of which two use an adapter, and a job's loss and gradient norm by step."""
    engine.load_adapter("a", make_adapter(engine.model.weights.whole, method, std=0.02))
    how = Sampling(max_tokens=6)
    for number, adapter in enumerate(("a", None, "a")):
        engine.add(f"r{number}", prompt_of(engine, 5 + number, number), how, adapter=adapter)
    dataset = make_dataset([20, 9], engine.model.config.vocab_size)
    engine.add_job("job", JobConfig(batch_size=2, n_epochs=2, epsilon=1e-4), method, dataset)
    outputs, events = run(engine, "r0", "r1", "r2")
    reports = [event.report for event in events + run(engine)[1] if event.report is not None]
    curve = [(r.train_loss, r.grad_norm) for r in reports if r.train_loss is not None and r.grad_norm]
    return [output.tokens for output in outputs.values()], curve


def test_a_worker_executes_what_it_chooses_for_a_high_rank(tmp_path: Path) -> None:
    """Over gloo sharing out A's product costs less than computing all of it on every rank."""
    folder = make_tiny_model(
        tmp_path / "wide", num_layers=1, hidden_size=2048, num_heads=16, intermediate_size=128
    )
    method = LoraConfig(256, 256.0, ("gate_proj", "up_proj", "down_proj"))
    options = {"max_lora_rank": method.rank, "num_threads": 1}
    with open_engine(make_config(folder, **options), 2) as ranks:
        ours = serve_and_train(ranks, method)
        for weights in (ranks.adapters.get("a"), ranks.runner.trainers["job"].parameters.weights):
            composition = weights.shards.layout.find("gate_up")
            assert composition is not None and composition.name == "③+③"
    theirs = serve_and_train(make_engine(folder, **options), method)
    assert ours[0] == theirs[0] and theirs[0][0] != theirs[0][1]
    assert len(theirs[1]) == 2
    for found, expected in zip(ours[1], theirs[1], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


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
