"""A plan says what the engine then does, to the byte; and of large models what was computed by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from services.gpu_worker.baseline import LiveBytes
from services.gpu_worker.compiler.flops import backward_flops, forward_flops, head_flops
from services.gpu_worker.compiler.plan import TensorState
from services.gpu_worker.compiler.presets import preset
from services.gpu_worker.compiler.programs import CompiledMethod
from services.gpu_worker.compiler.rematerialize import policy_keeping
from services.gpu_worker.compiler.sizes import Sizes
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig, Phase
from services.gpu_worker.finetune.trainer import Trainer, examples_of
from services.gpu_worker.kernels.backend import TORCH
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.linear import DenseLinear
from services.gpu_worker.kernels.quantised import SCHEMES, quantise
from services.gpu_worker.model.config import ModelConfig, UnsupportedModel
from services.gpu_worker.model.peft import LoraConfig, Method, PrefixConfig, num_virtual_tokens
from services.gpu_worker.model.transformer import Transformer
from services.gpu_worker.model.weights import load_weights
from services.gpu_worker.plan import Request
from services.gpu_worker.planner import Planner
from tests.builders import make_tiny_model
from tests.gpu_worker.test_gradients import METHODS
from tests.gpu_worker.training import BLOCK_SIZE, backward_peak, forward, make_dataset

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(16, 32.0, TARGETS)
BY_HAND = 0.75  # percent: rounded to whole ones, and without what is low-rank or elementwise
NUM_TOKENS, WINDOW = 64, 16
ALL = frozenset({"q_rotated", "o", "lse", "x2", "gate", "up"})
WITHOUT_GATE_AND_UP = ALL - {"gate", "up"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "qwen2"
    return make_tiny_model(path, "qwen2", tied=False, num_layers=3, num_heads=8)


def make_planner(folder: Path, method: Method, **changes: Any) -> Planner:
    config = json.loads((folder / "config.json").read_text())
    settings: dict[str, Any] = {
        "dtype": torch.float32, "sequence_tokens": NUM_TOKENS, "window_tokens": WINDOW, "kernels": "torch"
    }  # fmt: skip
    return Planner(Request("tiny", config, method, **(settings | changes)))


def large(name: str, sequence_tokens: int = 8192, **changes: Any) -> Planner:
    return Planner(Request(name, preset(name), LORA, sequence_tokens=sequence_tokens, **changes))


# --- what was computed by hand: LoRA on all linears, bfloat16, 8192 tokens, keys and values included


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        (
            "Llama-3.1-8B",
            {94336: (23.03, 0), 36992: (9.03, 20), 28800: (7.03, 23), 20608: (5.03, 26), 12288: (3.0, 31)},
        ),
        (
            "Qwen2.5-14B",
            {
                100512: (36.81, 0),
                45216: (16.56, 19),
                34976: (12.81, 23),
                24736: (9.06, 26),
                14336: (5.25, 32),
            },
        ),
        (
            "Qwen2.5-32B",
            {
                155808: (76.08, 0),
                45216: (22.08, 25),
                34976: (17.08, 27),
                24736: (12.08, 29),
                14336: (7.0, 33),
            },
        ),
    ],
)
def test_the_policies_of_large_models_are_those_computed_by_hand(
    name: str, by_hand: dict[int, tuple[float, int]]
) -> None:
    planner = large(name)
    found = {p.bytes_per_token_layer: p for p in planner.policy_plans()}
    assert list(found)[-6:] == [*list(by_hand)[:1], list(found)[-5], *list(by_hand)[1:]]
    for size, (gib, percent) in by_hand.items():
        assert found[size].sequence_bytes == size * 8192 * planner.config.num_layers
        assert found[size].sequence_bytes / 2**30 == pytest.approx(gib, abs=0.005)
        assert found[size].extra_flops_percent == pytest.approx(percent, abs=BY_HAND)


def test_only_gate_or_only_up_may_be_kept() -> None:
    found = [p.bytes_per_token_layer for p in large("Llama-3.1-8B").policy_plans()]
    assert found[found.index(94336) + 1] == 94336 - 2 * 14336 == 65664


@pytest.mark.parametrize(
    ("labels", "percent"),
    [
        (ALL, 0),
        (WITHOUT_GATE_AND_UP, 23),
        (WITHOUT_GATE_AND_UP - {"q_rotated"}, 27),
        (frozenset({"o", "lse"}), 30),
    ],
)
def test_a_short_sequence_pays_more_for_products_and_less_for_attention(
    labels: frozenset[str], percent: int
) -> None:
    planner = large("Llama-3.1-8B", 2048)
    joint = planner.compiled.joint
    policy = policy_keeping(joint, labels, planner.compiled.bytes_of(joint))
    assert planner.percent(policy) == pytest.approx(percent, abs=BY_HAND)


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [
        ("Llama-3.1-8B", {512: 30.8, 2048: 32.2, 8192: 37.8}),
        ("Qwen2.5-14B", {512: 57.3, 2048: 60.0, 8192: 70.5}),
        ("Qwen2.5-32B", {512: 130, 2048: 133.6, 8192: 147.7}),
    ],
)
def test_a_token_costs_as_many_flops_as_computed_by_hand(name: str, gigaflops: dict[int, float]) -> None:
    for length, expected in gigaflops.items():
        assert large(name, length).flops.total / 1e9 == pytest.approx(expected, rel=0.003)


def test_flops_of_the_parts_follow_the_formulas() -> None:
    config = ModelConfig.from_hf(preset("Llama-3.1-8B"))
    compiled = CompiledMethod(config, LORA, dtype=torch.bfloat16, sequence_length=2048)
    d, f, q, context = 4096, 14336, 4096, 1024.5
    linears = d * (q + 2 * 1024) + q * d + 3 * d * f
    forward, backward = (
        forward_flops(compiled.joint),
        backward_flops(compiled.joint, Sizes.of(config, 2048), LORA),
    )
    assert forward == pytest.approx(2 * linears + 4 * context * q, rel=0.01)  # the rest is LoRA's
    assert backward == pytest.approx(2 * linears + 10 * context * q, rel=0.015)
    assert head_flops(config, LORA) == 4 * d * 128256
    with_head = LoraConfig(16, 32.0, ("lm_head",))
    assert head_flops(config, with_head) == 4 * d * 128256 + 6 * 16 * (d + 128256)


def test_an_8b_model_is_named_with_its_baselines_and_saves_what_it_says() -> None:
    plan = large("Llama-3.1-8B").plan()
    lean, default, checkpointed = plan.baselines
    assert [step.name for step in plan.baselines] == [
        "transformers + peft, adapters in bfloat16",
        "transformers + peft, adapters in float32 (peft's default)",
        "transformers + peft, gradient checkpointing",
    ]
    kept = [round(step.kept_bytes / 2**30, 2) for step in plan.baselines]
    assert kept == [45.09, 72.14, 2.0]
    assert lean.extra_flops_percent == default.extra_flops_percent == 0
    assert checkpointed.extra_flops_percent == pytest.approx(43, abs=0.5)  # one more forward

    pruned, elementwise, products, windows, leanest = plan.ablation
    peaks = [step.peak_bytes for step in plan.ablation]
    assert peaks == sorted(peaks, reverse=True)
    assert elementwise.kept_bytes / 2**30 == pytest.approx(23.03, abs=0.005)
    assert pruned.kept_bytes > elementwise.kept_bytes > products.kept_bytes == windows.kept_bytes
    for ours in (windows, leanest):
        assert ours.peak_bytes < 0.15 * lean.peak_bytes
        assert ours.kept_bytes < 0.15 * lean.kept_bytes
    assert plan.memory.activation_bytes + plan.memory.kv_bytes == windows.kept_bytes
    assert plan.memory.peak_bytes == windows.peak_bytes
    assert plan.operations.before_pruning > plan.operations.after_pruning
    assert plan.operations.after_pruning > plan.operations.after_pruning_in_first_layer


def test_kernels_of_a_gpu_hold_neither_masks_nor_gathered_keys() -> None:
    """Which are those of a plan for a GPU, and not of one for a CPU."""
    on_gpu, forced, on_cpu = (
        large("Llama-3.1-8B", **changes)
        for changes in ({}, {"kernels": "torch"}, {"kernels": "auto", "hardware": "cpu"})
    )
    found, of_torch = (planner.memory(planner.policies) for planner in (on_gpu, forced))
    tokens, window, heads = 8192, on_gpu.window, 4
    masks = sum(heads * end * window * 2 for end in range(tokens, 0, -window))
    assert (found.sequence.mask_bytes, of_torch.sequence.mask_bytes) == (0, masks)
    gathered = 2 * 8192 * 1024 * 2
    assert found.window.backward_bytes < of_torch.window.backward_bytes - gathered
    assert found.activation_bytes == of_torch.activation_bytes
    assert found.peak_bytes < of_torch.peak_bytes - masks
    assert on_cpu.kernels is TORCH and on_gpu.kernels.is_triton
    assert on_gpu.programs == forced.programs
    with pytest.raises(ValueError, match="kernels 'cuda' are none of auto, triton, torch"):
        large("Llama-3.1-8B", kernels="cuda")


# --- what the engine does


def make_trainer(folder: Path, planner: Planner) -> Trainer:
    """A job of one sequence with the planned policies."""
    request = planner.request
    model = Transformer(load_weights(folder, request.dtype, torch.device("cpu")), max_position=512)
    extra = num_virtual_tokens(request.method)
    dataset = make_dataset([request.sequence_tokens - extra], model.config.vocab_size)
    config = JobConfig(batch_size=1)
    job = FinetuneJob(
        job_id="ftjob-test",
        config=config,
        training=examples_of(dataset, request.method),
        validation=None,
        num_layers=model.config.num_layers,
        max_tokens_in_flight=request.sequence_tokens,
        trains_layers=planner.compiled.trains_layers,
    )
    job.blocks = list(range(request.sequence_tokens // BLOCK_SIZE))
    heads = model.config.num_kv_heads, model.config.head_dim
    cache = KVCache(
        model.config.num_layers, len(job.blocks), BLOCK_SIZE, *heads, request.dtype, torch.device("cpu")
    )
    return Trainer(model, cache, job, dataset, None, planner.policies)


@pytest.mark.parametrize("budget", [None, 150_000])
@pytest.mark.parametrize("name", METHODS)
def test_the_buffers_of_a_job_are_as_large_as_planned(folder: Path, name: str, budget: int | None) -> None:
    planner = make_planner(folder, METHODS[name], budget_bytes=budget)
    memory, adapter, trainer = (
        planner.memory(planner.policies),
        planner.adapter(),
        make_trainer(folder, planner),
    )
    trainer.begin(trainer.job.sequence)
    assert trainer.memory.activations == memory.activation_bytes
    assert trainer._cache.size_bytes == memory.kv_bytes
    assert trainer.parameters.size_bytes == adapter.total_bytes
    assert trainer.parameters.flat.numel() == adapter.num_parameters
    assert trainer._gradients is not None
    assert trainer._gradients.dx.nbytes == memory.sequence.residual_gradient_bytes
    assert trainer._gradients.dk.nbytes + trainer._gradients.dv.nbytes == memory.sequence.kv_gradient_bytes
    kept = [tensor for tensor in planner.tensors() if tensor.state is TensorState.KEPT]
    sizes = sum(tensor.bytes_per_token * tensor.kept_in_layers for tensor in kept)
    assert sizes * NUM_TOKENS == trainer.memory.activations


def test_a_budget_buys_activations_until_it_is_spent(folder: Path) -> None:
    """As the engine spends it; where not even the leanest policy fits, that one is taken."""
    found = []
    for budget in (0, 100_000, 150_000, 200_000, 10**9):
        planner = make_planner(folder, LORA, budget_bytes=budget)
        kept = planner.memory(planner.policies).activation_bytes
        assert planner.fits_budget == (kept <= budget) == (budget > 90_000)
        found.append(kept)
    assert found == sorted(found)
    assert len(set(found)) > 3


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "serial", "prefix"])
def test_a_window_holds_at_its_peak_what_a_dry_run_says(folder: Path, name: str) -> None:
    planner = make_planner(folder, METHODS[name])
    predicted, trainer = planner.memory(planner.policies), make_trainer(folder, planner)
    assert backward_peak(trainer, WINDOW, LiveBytes) == pytest.approx(
        predicted.window.backward_bytes, rel=0.02
    )
    masks = [part.mask for own in trainer._flight._windows.values() for part in own.window.parts]
    assert sum(mask.nbytes for mask in masks) == predicted.sequence.mask_bytes


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "serial", "parallel", "prefix", "prompt"])
def test_a_sequence_holds_at_its_peak_what_was_planned(folder: Path, name: str) -> None:
    """All that is allocated from its first token to its last gradient, beside model, cache and parameters."""
    planner = make_planner(folder, METHODS[name])
    predicted, trainer = planner.memory(planner.policies), make_trainer(folder, planner)
    job = trainer.job
    with LiveBytes() as live:
        trainer.begin(job.sequence)
        while job.phase is Phase.FORWARD:
            window = job.next_window(WINDOW)
            forward(trainer, window)
            job.complete(window)
        while job.phase is Phase.BACKWARD:
            window = job.next_step(WINDOW)
            trainer.backward(window)
            job.complete(window)
    planned = predicted.activation_bytes + predicted.sequence.total + predicted.window.peak
    assert live.peak == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_take_as_many_bytes_as_planned(tmp_path: Path, architecture: Any, dtype: torch.dtype) -> None:
    folder = make_tiny_model(tmp_path / "model", architecture, tied=architecture == "llama", num_layers=3)
    weights = make_planner(folder, LORA, dtype=dtype, hardware="cpu").weights()
    cpu = torch.device("cpu")
    dense = load_weights(folder, dtype, cpu)
    has_second_layout = DenseLinear(torch.zeros(32, 32, dtype=dtype)).size_bytes > 32 * 32 * dtype.itemsize
    second = weights.second_layout_bytes if has_second_layout else 0
    assert dense.size_bytes == weights.bytes_by_form["none"] + second
    for scheme in SCHEMES:
        real = load_weights(folder, torch.float32, cpu, partial(quantise, scheme=scheme)).size_bytes
        assert real == make_planner(folder, LORA).weights().bytes_by_form[scheme]


def test_a_rank_holds_its_part(folder: Path) -> None:
    plan = make_planner(folder, LORA, tensor_parallel=2, budget_bytes=300_000).plan()
    assert plan.rank is not None
    assert plan.rank.memory.kv_bytes * 2 == plan.memory.kv_bytes
    assert plan.fits_budget is True
    assert plan.memory.activation_bytes / 2 < plan.rank.memory.activation_bytes < plan.memory.activation_bytes
    assert plan.weights.bytes_by_form["none"] / 2 < plan.rank.weight_bytes
    assert plan.rank.weight_bytes < plan.weights.bytes_by_form["none"]
    for site in {candidate.site for candidate in plan.parallel}:
        assert [c.is_chosen for c in plan.parallel if c.site == site].count(True) == 1


def test_a_rank_holds_what_the_chosen_layouts_leave_to_it() -> None:
    """Over gloo A's product of a high rank is shared out, and with it A."""
    request = Request(
        "Llama-3.1-8B",
        preset("Llama-3.1-8B"),
        replace(LORA, rank=128),
        sequence_tokens=1024,
        window_tokens=256,
        tensor_parallel=4,
        hardware="cpu",
    )
    planner = Planner(request)
    chosen = [candidate for candidate in planner.candidates() if candidate.is_chosen]
    assert {candidate.name for candidate in chosen} == {"②+④"}
    rank = planner.rank()
    bytes_each = 2 + 4 + 12  # the copy that computes, gradient, master and moments
    size = sum(candidate.trainable_bytes_per_rank for candidate in chosen)
    assert rank.adapter.num_parameters * bytes_each == 32 * size
    assert rank.adapter.gradient_bytes == 4 * rank.adapter.num_parameters
    assert rank.adapter.num_parameters * 4 == planner.adapter().num_parameters
    assert 0 < rank.memory.window.backward_bytes < planner.memory(planner.policies).window.backward_bytes


def test_nothing_is_kept_where_the_layers_are_not_trained(folder: Path) -> None:
    planner = make_planner(folder, METHODS["lora-head"])
    memory = planner.memory(planner.policies)
    assert planner.policy_plans() == []
    assert memory.activation_bytes == memory.window.backward_bytes == planner.operations().after_pruning == 0
    states = {tensor.state for tensor in planner.tensors()}
    assert states == {TensorState.PRUNED, TensorState.IN_CACHE, TensorState.COMPRESSED}


def test_what_is_compressed_says_what_stands_in_its_place(folder: Path) -> None:
    planner = make_planner(folder, LORA, dropout=0.1)
    compressed = [tensor for tensor in planner.tensors() if tensor.state is TensorState.COMPRESSED]
    assert all(tensor.in_its_place for tensor in compressed)
    sizes = {tensor.name: tensor.bytes_per_token for tensor in compressed}
    assert sizes.pop("logits") == 4 * planner.config.vocab_size
    assert sizes.pop("probabilities") == 8 * (NUM_TOKENS + 1) / 2 * 4
    assert set(sizes) == {"qkv_mask", "o_mask", "gate_up_mask", "down_mask"}


def test_without_peft_the_plan_says_so_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    plan = make_planner(folder, LORA).plan()
    assert plan.baselines == []
    assert plan.baseline_problem is not None and "pip install peft" in plan.baseline_problem
    assert len(plan.ablation) == 5


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (LORA, {"tensor_parallel": 3}, "cannot share"),
        (LORA, {"sequence_tokens": 10_000}, "10000 tokens: the model has 2048 positions"),
        (PrefixConfig(70), {}, "of which the method takes 70"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    folder: Path, method: Method, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        make_planner(folder, method, **changes)
