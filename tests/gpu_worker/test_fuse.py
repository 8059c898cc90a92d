"""Operations that one kernel takes together compute the same as one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.fx import Graph

from services.gpu_worker.compiler.emit import compile_graph, emit_backward
from services.gpu_worker.compiler.fuse import fuse_backward, fuse_forward
from services.gpu_worker.compiler.programs import CompiledMethod, ForwardPrograms
from services.gpu_worker.kernels.attention import causal_mask
from services.gpu_worker.kernels.backend import TORCH
from services.gpu_worker.kernels.bypass import (
    accumulate_blocks,
    accumulate_low_rank,
    accumulate_product,
    low_rank_backward_,
)
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.norm_rope import add_rms_norm, rms_norm
from services.gpu_worker.model import layer
from services.gpu_worker.model.attention import GatheredAttention, PagedWindow, WindowPart
from services.gpu_worker.model.context import Capture, ForwardContext, LayerProgram
from services.gpu_worker.model.peft import LoraConfig
from services.gpu_worker.model.transformer import Transformer
from tests.builders import make_tiny_model
from tests.gpu_worker.training import make_transformer

NUM_TOKENS = 9


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder: Path = tmp_path_factory.mktemp("models") / request.param
    return make_transformer(make_tiny_model(folder, request.param))


def graph_of(model: Transformer, *kept: str, sites: frozenset[str] = frozenset()) -> Graph:
    return ForwardPrograms(model.config).graph(sites, frozenset(kept))


def targets(graph: Graph) -> list[object]:
    return [node.target for node in graph.nodes]


class Kept(dict[tuple[int, str], torch.Tensor]):
    def save(self, layer: int, name: str, start: int, rows: torch.Tensor) -> None:
        self[layer, name] = rows.clone()


def forward(model: Transformer, program: LayerProgram) -> tuple[torch.Tensor, torch.Tensor, Kept]:
    """Hidden states, all of the cache, and what was kept."""
    config, kept = model.config, Kept()
    cache = KVCache(
        config.num_layers, 3, 4, config.num_kv_heads, config.head_dim, torch.float32, torch.device("cpu")
    )
    mask = causal_mask(
        NUM_TOKENS, NUM_TOKENS, config.num_heads // config.num_kv_heads, torch.float32, torch.device("cpu")
    )
    window = PagedWindow(
        cache.pages([[0, 1, 2]]), [WindowPart(slice(0, NUM_TOKENS), slice(0, NUM_TOKENS), mask)]
    )
    positions = list(range(NUM_TOKENS))
    context = ForwardContext(
        positions=torch.tensor(positions),
        slots=cache.slots([i // 4 for i in positions], [i % 4 for i in positions]),
        program=program,
        attention=GatheredAttention([window]),
        captures=[Capture(slice(0, NUM_TOKENS), kept, 0)],
    )
    hidden = model.forward(torch.arange(NUM_TOKENS) * 5 + 3, cache, context)
    return hidden, torch.stack([cache.keys, cache.values]), kept


def test_a_fused_program_computes_and_keeps_the_same(model: Transformer) -> None:
    labels = ("x", "q_rotated", "x2", "h2", "gate")
    plain, fused = graph_of(model, *labels), graph_of(model, *labels)
    fuse_forward(fused)
    found = targets(fused)
    assert layer.rotate_cache_write in found and add_rms_norm in found
    assert not {layer.rotate, layer.cache_write} & set(found)
    assert found.count(rms_norm) == targets(plain).count(rms_norm) - 1
    expected, own = (forward(model, compile_graph(graph, TORCH)) for graph in (plain, fused))
    torch.testing.assert_close(own[:2], expected[:2], rtol=0, atol=0)
    assert own[2].keys() == expected[2].keys()
    for key, rows in own[2].items():
        torch.testing.assert_close(rows, expected[2][key], rtol=0, atol=0)


@pytest.mark.parametrize("kept", [("k_rotated",), ()])
def test_keys_that_somebody_else_reads_stay_apart(model: Transformer, kept: tuple[str, ...]) -> None:
    """Those that are kept, and those among which prefix tuning puts its own."""
    graph = graph_of(model, *kept, sites=frozenset() if kept else frozenset({"prefix"}))
    fuse_forward(graph)
    found = targets(graph)
    assert layer.rotate_cache_write not in found and layer.cache_write in found


# --- backward


def backward_graph(model: Transformer, method: LoraConfig, dropout: bool) -> Graph:
    compiled = CompiledMethod(
        model.config, method, dtype=torch.float32, sequence_length=NUM_TOKENS, dropout=dropout
    )
    return emit_backward(compiled.joint, compiled._nodes(compiled.joint, compiled.policies[-1]))


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("method_targets", [("q_proj", "v_proj", "down_proj"), ("gate_proj",)])
def test_each_linears_gradients_are_one_operation(
    model: Transformer, method_targets: tuple[str, ...], dropout: bool
) -> None:
    method = LoraConfig(4, 8.0, method_targets)
    plain, fused = (backward_graph(model, method, dropout) for _ in range(2))
    fuse_backward(fused)
    found, num_linears = targets(fused), targets(plain).count(accumulate_blocks)
    assert num_linears == (2 if "q_proj" in method_targets else 1)
    # a dropout's mask lies over what goes on to the input
    whole, other = accumulate_low_rank, low_rank_backward_
    if not dropout:
        whole, other = other, whole
    assert found.count(whole) == num_linears
    assert not {accumulate_blocks, accumulate_product, other} & set(found)
    fused.lint()
