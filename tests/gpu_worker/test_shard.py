"""One rank's part of a model: what it reads of a checkpoint, where its layer talks to others, what it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.fx import Graph

from services.gpu_worker.compiler.emit import emit_backward
from services.gpu_worker.compiler.operations import ALL_REDUCE_FLOPS
from services.gpu_worker.compiler.parallelize import ParallelPlan, parallelize
from services.gpu_worker.compiler.programs import CompiledMethod, ForwardPrograms
from services.gpu_worker.compiler.shard import trace_rank
from services.gpu_worker.compiler.trace import trace
from services.gpu_worker.kernels.quantised import quantise
from services.gpu_worker.model import layer, layer_backward
from services.gpu_worker.model.config import ModelConfig, UnsupportedModel
from services.gpu_worker.model.layouts import Collective, Layout, Move, Split
from services.gpu_worker.model.parallel import Group, read_shard
from services.gpu_worker.model.parameters import parameters
from services.gpu_worker.model.peft import LoraConfig, Method, PrefixConfig
from services.gpu_worker.model.shards import ParameterShards
from services.gpu_worker.model.weights import ModelWeights, load_weights
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import METHODS, TARGETS

CPU = torch.device("cpu")
ROLES = {
    "A": "a",
    "B": "b",
    "down": "down_w",
    "up": "up_w",
    "magnitude": "magnitude",
}  # of a plan's operations


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_model(path, "qwen2", num_heads=8, num_kv_heads=4, tied=False)


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return ModelConfig.from_folder(folder)


def rank_of(rank: int, size: int) -> Group:
    """Of a group that nobody calls: enough to load what is the rank's."""
    group = Group()
    group.rank, group.size = rank, size
    return group


def load_ranks(folder: Path, size: int) -> list[ModelWeights]:
    return [load_weights(folder, torch.float32, CPU, group=rank_of(rank, size)) for rank in range(size)]


def plan(config: ModelConfig, method: Method, tp: int = 2) -> ParallelPlan:
    return parallelize(config, method, tp)


def compile_rank(config: ModelConfig, method: Method) -> CompiledMethod:
    """Of two ranks that lie as is cheapest over NVLink."""
    layout = plan(config, method).layout
    return CompiledMethod(config, method, dtype=torch.float32, sequence_length=64, layout=layout)


def shards_of(folder: Path, method: Method, size: int) -> list[ParameterShards]:
    ranks = load_ranks(folder, size)
    layout = plan(ranks[0].whole, method, size).layout
    return [ParameterShards(weights, method, layout) for weights in ranks]


def targets_of(graph: Graph) -> list[Any]:
    return [node.target for node in graph.nodes]


def sums_of(graph: Graph) -> int:
    return sum(target in (layer.all_reduce, layer.all_reduce_) for target in targets_of(graph))


# --- loading


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_weights_make_the_models(folder: Path, size: int) -> None:
    whole, ranks = load_weights(folder, torch.float32, CPU), load_ranks(folder, size)
    config = whole.config
    blocks = {
        "qkv": (config.q_size, config.kv_size, config.kv_size),
        "gate_up": (config.intermediate_size, config.intermediate_size),
    }
    for index, theirs in enumerate(whole.layers):
        for name, rows in blocks.items():
            parts = [rank.layers[index].linear(name) for rank in ranks]
            mine = [part.dense().split([row // size for row in rows]) for part in parts]
            joined = torch.cat([torch.cat(projection) for projection in zip(*mine, strict=True)])
            assert torch.equal(joined, theirs.linear(name).dense())
            assert all(part.size_bytes * size == theirs.linear(name).size_bytes for part in parts)
        for name in ("o", "down"):
            parts = [rank.layers[index].linear(name) for rank in ranks]
            assert torch.equal(torch.cat([part.dense() for part in parts], 1), theirs.linear(name).dense())
    for rank in ranks:
        assert torch.equal(rank.embedding, whole.embedding)
        assert torch.equal(rank.head.dense(), whole.head.dense())
        assert rank.whole == config


class Reads:
    """A checkpoint's file that notes how many elements were asked of each tensor."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.elements: dict[str, int] = {}
        self._name = ""

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        self.elements[name] = tensor.numel()
        return tensor

    def get_slice(self, name: str) -> Reads:
        self._name = name
        return self

    def __getitem__(self, place: Any) -> Tensor:
        tensor: Tensor = self._file.get_slice(self._name)[place]
        self.elements[self._name] = tensor.numel()
        return tensor


def test_a_rank_asks_a_checkpoint_for_its_slices_alone(folder: Path, config: ModelConfig) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        reads = Reads(file)
        names = list(file.keys())
        sizes = {name: file.get_tensor(name).numel() for name in names}
        for name in names:
            read_shard(reads, name, config, 1, 4)
    for name, size in sizes.items():
        divided = name.endswith(("_proj.weight", "_proj.bias"))
        assert reads.elements[name] == (size // 4 if divided else size), name


def test_a_quantised_rank_is_quantised_from_its_part(folder: Path) -> None:
    def make(weight: Tensor, bias: Tensor | None) -> Any:
        return quantise(weight, bias, scheme="int4", group_size=32)

    whole = load_weights(folder, torch.float32, CPU, make)
    ranks = [load_weights(folder, torch.float32, CPU, make, rank_of(rank, 2)) for rank in range(2)]
    for name in ("o", "down"):  # groups of inputs stay groups
        parts = [rank.layers[0].linear(name).dense() for rank in ranks]
        assert torch.equal(torch.cat(parts, 1), whole.layers[0].linear(name).dense())


def test_ranks_that_cannot_share_the_heads_are_refused_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="3 ranks: they cannot share 4 key/value heads evenly"):
        load_weights(folder, torch.float32, CPU, group=rank_of(0, 3))


# --- the layer


def test_a_rank_alone_has_the_layer_as_it_is_traced(config: ModelConfig) -> None:
    assert str(trace_rank(config, 1)) == str(trace(config))


def test_a_ranks_forward_sums_twice(config: ModelConfig) -> None:
    programs = ForwardPrograms(config, 2)
    for sites in (frozenset(), frozenset(("qkv", "o", "gate_up", "down", "o_in", "down_in"))):
        graph = programs.graph(sites, frozenset())
        assert sums_of(graph) == 2
        used = [
            t
            for t in targets_of(graph)
            if t in (layer.bypass_low_rank, layer.all_reduce, layer.bypass_change)
        ]
        halves = [layer.bypass_low_rank, layer.all_reduce, layer.bypass_change]
        assert used == (2 * halves if sites else [layer.all_reduce] * 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lora", 2), ("dora", 2), ("ia3", 2), ("prefix", 2), ("parallel", 2), ("serial", 2 + 5)],
)
def test_a_ranks_backward_sums_in_front_of_the_column_parallel_linears(
    config: ModelConfig, name: str, expected: int
) -> None:
    """A serial bottleneck behind one of the five column-parallel projections sums for itself too."""
    assert sums_of_nodes(compile_rank(config, METHODS[name]).joint.backward) == expected


def sums_of_nodes(nodes: Any) -> int:
    """Of the backbone's and of the bypasses' own."""
    moves = [Move(*node.args[2]) for node in nodes if node.target is layer_backward.move]
    own = sum(move.collective is Collective.ALL_REDUCE for move in moves)
    return own + sum(node.target is layer.all_reduce for node in nodes)


def test_the_lowest_layer_sums_no_gradient_that_nobody_wants(config: ModelConfig) -> None:
    compiled = compile_rank(config, LoraConfig(4, 4.0, TARGETS))
    joint = compiled.joint_graph(needs_input_gradient=False)
    assert sums_of_nodes(joint.backward) == 1  # in front of gate_up


def test_a_policy_that_keeps_next_to_nothing_sums_again(config: ModelConfig) -> None:
    joint = compile_rank(config, METHODS["lora"]).joint
    labels = {node.meta.get("label"): node for node in joint.forward}
    lean, rich = emit_backward(joint, set()), emit_backward(joint, {labels["x2"]})
    assert (sums_of(lean), sums_of(rich)) == (3, 2)


def test_what_a_bypass_sends_is_counted_where_it_is_computed_again(config: ModelConfig) -> None:
    """Half of A's product is saved, and its sum is sent; nobody can keep it."""
    found, lean = plan(config, METHODS["lora"]), {}
    for candidate in found.plan_of("qkv").candidates:
        layout = Layout(2, {**found.layout.compositions, "qkv": candidate.composition})
        compiled = CompiledMethod(
            config, METHODS["lora"], dtype=torch.float32, sequence_length=64, layout=layout
        )
        assert not any("low" in label for policy in compiled.policies for label in policy.kept)
        lean[candidate.name] = compiled.policies[-1].flops_per_token
    rank, product = 3 * 4, 2 * config.hidden_size * 3 * 4
    assert lean["②+④"] - lean["①+④"] == rank * ALL_REDUCE_FLOPS - product / 2
    assert lean["③+④"] - lean["①+④"] == rank * ALL_REDUCE_FLOPS / 2 - product / 2


# --- what is trained


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_holds_the_shapes_of_what_is_chosen(
    folder: Path, config: ModelConfig, name: str, tp: int
) -> None:
    method = METHODS[name]
    shards = shards_of(folder, method, tp)[0]
    found = {p.key: shards.dim(p.place) for p in shards.own}
    for bypass in plan(config, method, tp).plans:
        for operation, split in bypass.chosen.shardings:
            for target in bypass.site.targets:
                for key in keys_of(found, target, operation, method):
                    assert found[key] == (1 if isinstance(method, PrefixConfig) else split), key


def keys_of(found: dict[str, Any], target: str, operation: str, method: Method) -> list[str]:
    if operation in ROLES:
        return [f"{target}.{ROLES[operation]}"]
    return [key for key in found if key.rpartition(".")[0] in (target, operation)]


def test_the_gradients_that_are_summed_are_those_of_the_plan(folder: Path) -> None:
    found = {}
    for name in ("lora", "prefix", "parallel"):
        shards = shards_of(folder, METHODS[name], 2)[0]
        found[name] = {p.key for p in shards.own if shards.is_partial(p.place)}
    by_columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert found["lora"] == {f"{name}.a" for name in by_columns} | {"o_proj.b", "down_proj.b"}
    assert not found["prefix"]
    assert found["parallel"] == {f"{name}.down_{role}" for name in by_columns for role in "wb"}


@pytest.mark.parametrize("name", METHODS)
def test_what_ranks_take_of_a_parameter_is_all_of_it_once(
    folder: Path, config: ModelConfig, name: str
) -> None:
    ranks = shards_of(folder, METHODS[name], 4)
    for parameter in parameters(config, METHODS[name]):
        value = torch.arange(parameter.numel).view(parameter.shape)
        parts = [shards.part(parameter, value) for shards in ranks]
        if ranks[0].dim(parameter.place) is None:
            assert all(torch.equal(part, value) for part in parts)
        else:
            together = torch.cat([part.flatten() for part in parts])
            assert torch.equal(together.sort().values, value.flatten())


def test_a_dimension_is_split_as_the_backbones_tensor_beside_it(folder: Path) -> None:
    shards = shards_of(folder, replace(LoraConfig(4, 4.0, TARGETS), dora=True), 2)[0]
    found = {p.key: shards.dim(p.place) for p in shards.own}
    assert (found["q_proj.a"], found["q_proj.b"], found["q_proj.magnitude"]) == (None, Split.OUT, Split.OUT)
    assert (found["o_proj.a"], found["o_proj.b"], found["o_proj.magnitude"]) == (Split.IN, None, None)
