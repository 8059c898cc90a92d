"""What the compiled programs contain and read: nothing that a frozen backbone does not need."""

from __future__ import annotations

import ast
import inspect
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from services.gpu_worker.compiler.programs import CompiledMethod, ForwardPrograms
from services.gpu_worker.compiler.reverse import JointGraph, prune
from services.gpu_worker.compiler.trace import SITES, insert_bypasses, trace
from services.gpu_worker.finetune.job import Phase, Window
from services.gpu_worker.finetune.trainer import Trainer
from services.gpu_worker.kernels import bypass as kernels
from services.gpu_worker.kernels.norm_rope import silu_mul
from services.gpu_worker.model import layer, layer_backward
from services.gpu_worker.model.peft import Ia3Config, LoraConfig, Method
from services.gpu_worker.model.transformer import Transformer
from tests.builders import make_tiny_model
from tests.gpu_worker.test_gradients import METHODS
from tests.gpu_worker.training import forward, make_dataset, make_trainer, make_transformer

NUM_TOKENS = 24
FROZEN_WEIGHTS = 6  # of a layer without biases and norms of heads: two norms, four fused linears
TRAINED = {name: method for name, method in METHODS.items() if name != "lora-head"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder: Path = tmp_path_factory.mktemp("models") / "llama"
    return make_transformer(make_tiny_model(folder, num_layers=2))


def compile_method(model: Transformer, method: Method) -> CompiledMethod:
    return CompiledMethod(model.config, method, dtype=torch.float32, sequence_length=NUM_TOKENS)


def make_forwarded(model: Transformer, method: Method, policy: int) -> Trainer:
    """A job whose only sequence has been through the forward, in one window."""
    extra = getattr(method, "num_virtual_tokens", 0)
    dataset = make_dataset([NUM_TOKENS - extra], model.config.vocab_size)
    trainer = make_trainer(model, dataset, method=method, policy=policy, max_tokens_in_flight=NUM_TOKENS)
    job = trainer.job
    job.blocks = list(range(trainer._cache.num_blocks))
    trainer.begin(job.sequence)
    window = job.next_window(NUM_TOKENS)
    forward(trainer, window)
    job.complete(window)
    return trainer


def targets(nodes: Any) -> set[Callable[..., Any]]:
    return {
        node.target for node in nodes if node.op == "call_function" and node.target is not operator.getitem
    }


def roots(joint: JointGraph) -> list[Node]:
    """What the backward is computed for: sums of trainable gradients, and the gradient of the layer's input."""
    ends = [node for node in joint.backward if not node.users]
    return ends if joint.dx is None else [*ends, joint.dx]


# --- graph pruning


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_pruning_again_changes_nothing(model: Transformer, name: str, needs_input_gradient: bool) -> None:
    joint = compile_method(model, METHODS[name]).joint_graph(needs_input_gradient)
    assert prune(joint.graph, roots(joint)) == joint.backward


@pytest.mark.parametrize("name", METHODS)
def test_every_end_of_the_backward_is_a_trainable_gradient(model: Transformer, name: str) -> None:
    joint = compile_method(model, METHODS[name]).joint_graph(needs_input_gradient=False)
    for node in roots(joint):
        assert isinstance(node.target, Callable)  # type: ignore[arg-type]
        assert node.target.__name__.startswith("accumulate_")  # type: ignore[union-attr]


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_of_a_frozen_weight_survives(model: Transformer, name: str) -> None:
    joint = compile_method(model, METHODS[name]).joint
    assert layer_backward.weight_gradient not in targets(joint.graph.nodes)
    left = sum(node.target is not operator.getitem for node in joint.backward)
    assert joint.num_differentiated >= left + FROZEN_WEIGHTS


@pytest.mark.parametrize("policy", [0, 2, -1])
@pytest.mark.parametrize("name", TRAINED)
def test_a_backward_program_reads_all_that_is_kept_and_fails_without_any_of_it(
    model: Transformer, name: str, policy: int
) -> None:
    trainer = make_forwarded(model, TRAINED[name], policy)
    for index in (1, 0):
        window, buffers = Window(0, NUM_TOKENS, index, Phase.BACKWARD), trainer.store._buffers
        kept, read = buffers[index], set()

        class Recording(dict[str, Tensor]):
            def __getitem__(self, label: str) -> Tensor:
                read.add(label)  # noqa: B023
                return super().__getitem__(label)

        buffers[index] = Recording(kept)
        trainer.backward(window)
        assert read == set(kept)
        for label in kept:
            buffers[index] = {other: tensor for other, tensor in kept.items() if other != label}
            with pytest.raises(KeyError, match=label):
                trainer.backward(window)


@pytest.mark.parametrize("name", TRAINED)
def test_a_leaner_policy_keeps_fewer_bytes_and_computes_more(model: Transformer, name: str) -> None:
    policies = compile_method(model, TRAINED[name]).policies
    sizes = [policy.bytes_per_token for policy in policies]
    flops = [policy.flops_per_token for policy in policies]
    assert sizes == sorted(set(sizes), reverse=True)
    assert flops == sorted(set(flops))
    assert policies[-1].kept == frozenset()


# --- the lowest bypass


def test_below_the_lowest_bypass_there_is_no_backward(model: Transformer) -> None:
    """At the first layer; above it the residual stream's gradient needs everything."""
    compiled = compile_method(model, LoraConfig(4, 6.0, ("down_proj",)))
    bottom = compiled.joint_graph(needs_input_gradient=False)
    assert targets(bottom.backward) == {
        kernels.accumulate_blocks,
        kernels.accumulate_product,
        layer_backward.product,
    }
    assert {node.meta["label"] for node in bottom.reads()} == {"m", "down_low"}
    assert {layer_backward.attend_backward, layer_backward.rotate_backward} <= targets(
        compiled.joint.backward
    )
    assert compiled.kept(compiled.policies[0], bottom=True) <= {"gate", "up", "m"}


@pytest.mark.parametrize(
    ("target", "gone"),
    [
        ("gate_proj", {"qkv", "o", "gate_up"}),
        ("o_proj", {"qkv", "o"}),
        ("v_proj", {"qkv"}),
    ],
)
def test_gradients_stop_at_the_linear_with_the_lowest_bypass(
    model: Transformer, target: str, gone: set[str]
) -> None:
    compiled = compile_method(model, LoraConfig(4, 6.0, (target,)))
    bottom = compiled.joint_graph(needs_input_gradient=False)
    passed = {
        node.args[1].args[1]  # type: ignore[union-attr]
        for node in bottom.backward
        if node.target is layer_backward.project_backward
    }
    assert passed == {"qkv", "o", "gate_up", "down"} - gone
    if target != "v_proj":
        assert layer_backward.attend_backward not in targets(bottom.backward)


def test_a_prompt_below_the_first_layer_needs_all_of_it(model: Transformer) -> None:
    compiled = compile_method(model, METHODS["prompt"])
    assert compiled.needs_embedding_gradient
    assert compiled.kept(compiled.policies[0], bottom=True) == compiled.kept(
        compiled.policies[0], bottom=False
    )


def test_a_bypass_of_the_head_alone_never_enters_the_layers(model: Transformer) -> None:
    trainer = make_forwarded(model, METHODS["lora-head"], 0)
    assert not trainer.policies.compiled.trains_layers
    assert trainer.job.phase is Phase.OPTIMIZER
    assert trainer.memory.activations == 0
    gradients = trainer.parameters.gradients
    assert gradients.keys() == {(None, "lm_head.a"), (None, "lm_head.b")}
    assert gradients[None, "lm_head.b"].any()  # A's is zero as long as B is


# --- forward programs


def test_the_base_models_program_has_neither_bypasses_nor_kept_tensors(model: Transformer) -> None:
    graph = ForwardPrograms(model.config).graph(frozenset(), frozenset())
    found = targets(graph.nodes)
    assert not found & {*SITES, layer.keep}
    assert layer.attend in found and silu_mul in found


def test_a_program_has_the_bypasses_in_use_and_keeps_what_is_asked_for(model: Transformer) -> None:
    graph = ForwardPrograms(model.config).graph(frozenset({"qkv"}), frozenset({"x", "gate"}))
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [node.args[-1] for node in calls if node.target in SITES] == ["qkv"]
    assert {node.args[-1] for node in calls if node.target is layer.keep} == {"x", "gate"}


def test_programs_are_made_once(model: Transformer) -> None:
    programs = ForwardPrograms(model.config)
    assert programs.get(frozenset(), frozenset()) is programs.get(frozenset(), frozenset())
    compiled = compile_method(model, METHODS["lora"])
    policy = compiled.policies[0]
    assert compiled.backward(policy, False) is compiled.backward(policy, False)


def test_bypasses_of_a_method_are_operations_of_its_own_graph(model: Transformer) -> None:
    graph = trace(model.config)
    insert_bypasses(graph, model.config, Ia3Config(), dropout=False)
    found = [node for node in graph.nodes if node.target is kernels.scale]
    assert len(found) == 3
    assert not targets(graph.nodes) & set(SITES)


# --- generated code


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("bottom", [True, False])
def test_a_program_is_straight_line_python(model: Transformer, name: str, bottom: bool) -> None:
    compiled = compile_method(model, TRAINED[name])
    program: Any = compiled.backward(compiled.policies[-1], bottom)
    (function,) = [
        node for node in ast.parse(program.__self__.code).body if isinstance(node, ast.FunctionDef)
    ]
    assert {type(statement) for statement in function.body} <= {ast.Assign, ast.Expr, ast.Return}
    assert [argument.arg for argument in function.args.args] == ["self", "dy", "w", "ctx", "p", "g", "kept"]


def test_no_interpreter_stands_between_a_program_and_its_operations(model: Transformer) -> None:
    trainer = make_forwarded(model, METHODS["lora"], 0)
    callers: list[str] = []

    class Watching(dict[str, Tensor]):
        def __getitem__(self, label: str) -> Tensor:
            frame = inspect.currentframe()
            while frame is not None:
                callers.append(frame.f_code.co_filename)
                frame = frame.f_back
            return super().__getitem__(label)

    trainer.store._buffers[1] = Watching(trainer.store._buffers[1])
    trainer.backward(Window(0, NUM_TOKENS, 1, Phase.BACKWARD))
    fx = str(Path(sys.modules["torch.fx"].__file__ or "").parent)
    assert any(name.startswith("<eval_with_key>") for name in callers)
    assert not any(name.startswith(fx) for name in callers)
