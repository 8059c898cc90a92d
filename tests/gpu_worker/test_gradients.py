"""The gate: token-level gradients equal whole-sequence autograd for any method and any cut into windows."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gpu_worker.compiler.programs import CompiledMethod
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.finetune.trainer import Trainer
from services.gpu_worker.kernels.dropout import Dropout
from services.gpu_worker.model.peft import (
    ACTIVATIONS,
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
    num_virtual_tokens,
    projections,
)
from tests.builders import make_tiny_model
from tests.gpu_worker.oracle import batch_loss, copy_to, exact_norms, make_peft, trainable_tensors
from tests.gpu_worker.training import advance, make_dataset, make_trainer, make_transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = ("llama", "llama3.1", "qwen2", "qwen3", "mistral")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LORA = LoraConfig(4, 6.0, TARGETS)
METHODS: dict[str, Method] = {
    "lora": LORA,
    "rslora": LoraConfig(4, 6.0, TARGETS, rslora=True),
    "dora": LoraConfig(4, 6.0, TARGETS, dora=True),
    "lora-vocabulary": LoraConfig(4, 6.0, ("q_proj", "embed_tokens", "lm_head")),
    "lora-embedding": LoraConfig(4, 6.0, ("embed_tokens",)),
    "lora-head": LoraConfig(4, 6.0, ("lm_head",)),
    "ia3": Ia3Config(),
    "ia3-everywhere": Ia3Config(TARGETS, ("o_proj", "down_proj")),
    "serial": BottleneckConfig(6),
    "serial-everywhere": BottleneckConfig(6, TARGETS, "gelu", 0.7),
    "parallel": BottleneckConfig(6, ("o_proj", "gate_proj", "down_proj"), "silu", 1.5, parallel=True),
    "prefix": PrefixConfig(5),
    "prompt": PromptConfig(5),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """Tiny models: 8 query heads over 2 key/value heads, tied and untied."""
    root = tmp_path_factory.mktemp("models")
    return {
        (name, tied): make_tiny_model(
            root / f"{name}-{tied}", name, tied=tied, num_layers=3, num_heads=8, num_kv_heads=2
        )
        for name in ARCHITECTURES
        for tied in (False, True)
    }


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-4))


def gradient_error(
    folder: Path,
    dtype: torch.dtype,
    method: Method,
    lengths: list[int],
    sizes: random.Random,
    largest: int,
    policy: int = -1,
    in_flight: int = 48,
    masked: float = 0.3,
    dropout: float = 0.0,
) -> float:
    """Worst relative error of any parameter's gradient over one optimizer step cut into random windows."""
    torch.manual_seed(0)
    model = make_transformer(folder, dtype)
    dataset = make_dataset(lengths, model.config.vocab_size, masked=masked)
    trainer = make_trainer(
        model,
        dataset,
        method=method,
        config=JobConfig(batch_size=len(dataset), lora_dropout=dropout),
        policy=policy,
        max_tokens_in_flight=max(in_flight, max(lengths) + num_virtual_tokens(method)),
    )
    return error_of(trainer, make_oracle(trainer, folder, dataset), lambda: sizes.randint(1, largest))


@dataclass(frozen=True, slots=True)
class Oracle:
    """A model of transformers and peft with the gradients of `loss`."""

    model: Any
    loss: float


def make_oracle(trainer: Trainer, folder: Path, dataset: Dataset) -> Oracle:
    """For all trainers of the same method, model and data."""
    with exact_norms():
        model = make_peft(folder, trainer._model.weights.dtype, trainer.method)
        if trainer.job.config.lora_dropout:
            use_masks(model, trainer)
        loss = batch_loss(model, dataset, list(range(len(dataset))))
        loss.backward()
    return Oracle(model, float(loss.detach()))


def error_of(trainer: Trainer, oracle: Oracle, window_size: Callable[[], int]) -> float:
    """Worst relative error of any parameter's gradient, from the oracle's parameters."""
    copy_to(trainer, oracle.model)
    advance(trainer, window_size)
    mean, _ = trainer._total.means().read()
    is_wide = trainer._model.weights.dtype == torch.float64
    assert mean == pytest.approx(oracle.loss, rel=1e-9 if is_wide else 1e-5)
    expected = trainable_tensors(oracle.model, trainer.method, trainer._model.config)
    ours = trainer.parameters.gradients
    assert ours.keys() == expected.keys()
    errors = {key: relative_error(ours[key], expected[key].grad.view(ours[key].shape)) for key in ours}
    return max(errors.values())


def use_masks(model: Any, trainer: Trainer) -> None:
    """Puts our masks of a single training sequence of one example where peft draws its own."""
    sequence = trainer.job.sequence
    dropout = Dropout(trainer.job.config.lora_dropout, f"0|0|{sequence.examples[0]}")
    tokens = slice(0, sequence.num_tokens)

    class Masked(torch.nn.Module):
        def __init__(self, layer: int, group: str) -> None:
            super().__init__()
            self.place = layer, group

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * dropout.mask(*self.place, tokens, x[0])

    known = projections(trainer._model.config)
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout") and "default" in module.lora_dropout:
            parts = name.split(".")
            place = int(parts[parts.index("layers") + 1]), known[parts[-1]].group
            module.lora_dropout["default"] = Masked(*place)


Folders = dict[tuple[str, bool], Path]


@pytest.mark.parametrize("policy", [0, -1])
def test_dropout_masks_are_the_same_in_every_window_and_in_the_backward(
    folders: Folders, policy: int
) -> None:
    error = gradient_error(
        folders["qwen3", False], torch.float64, LORA, [150], random.Random(4), 40, policy, dropout=0.4
    )
    assert error < 1e-9


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_equal_autograd_for_every_architecture(
    folders: Folders, architecture: str, tied: bool, dtype: torch.dtype
) -> None:
    error = gradient_error(folders[architecture, tied], dtype, LORA, [37, 22, 5], random.Random(1), 9, 3)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [*((name, torch.float64) for name in ("llama", "qwen2", "qwen3")), ("qwen3", torch.float32)],
    ids=str,
)
def test_gradients_equal_autograd_for_every_method(
    folders: Folders, architecture: str, name: str, dtype: torch.dtype
) -> None:
    lengths, windows = [37, 22, 5], random.Random(1)
    error = gradient_error(folders[architecture, False], dtype, METHODS[name], lengths, windows, 9, 1)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["lora", "dora", "ia3-everywhere", "serial-everywhere", "prefix", "prompt"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_every_activation_policy_gives_the_same_gradients(
    folders: Folders, architecture: str, name: str
) -> None:
    folder, method = folders[architecture, False], METHODS[name]
    model = make_transformer(folder, torch.float64)
    dataset = make_dataset([23, 14], model.config.vocab_size)
    oracle: Oracle | None = None
    policies = CompiledMethod(model.config, method, dtype=torch.float64, sequence_length=64).policies
    for number, policy in enumerate(policies):
        trainer = make_trainer(model, dataset, method=method, policy=number, max_tokens_in_flight=64)
        oracle = oracle or make_oracle(trainer, folder, dataset)
        sizes = random.Random(2)
        error = error_of(trainer, oracle, partial(sizes.randint, 1, 7))
        assert error < 1e-9, policy.name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_a_bottleneck_is_differentiated(folders: Folders, activation: Any) -> None:
    method = BottleneckConfig(6, ("q_proj", "down_proj"), activation)
    error = gradient_error(folders["llama", True], torch.float64, method, [19, 11], random.Random(3), 8)
    assert error < 1e-9


@pytest.mark.parametrize("largest", [1, 1000])
def test_windows_of_one_token_and_of_a_whole_sequence_are_exact(folders: Folders, largest: int) -> None:
    error = gradient_error(
        folders["llama", True], torch.float64, LORA, [19, 11], random.Random(3), largest, 0
    )
    assert error < 1e-9


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    lengths=st.lists(st.integers(4, 40), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    largest=st.integers(1, 50),
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
    policy=st.integers(-1, 3),
    in_flight=st.integers(40, 120),
    masked=st.sampled_from([0.0, 0.3, 0.6]),
)
def test_gradients_equal_autograd_for_random_windows(
    folders: Folders,
    architecture: str,
    tied: bool,
    dtype: torch.dtype,
    lengths: list[int],
    seed: int,
    largest: int,
    targets: list[str],
    policy: int,
    in_flight: int,
    masked: float,
) -> None:
    method = LoraConfig(4, 6.0, tuple(name for name in TARGETS if name in targets))
    windows = random.Random(seed)
    error = gradient_error(
        folders[architecture, tied], dtype, method, lengths, windows, largest, policy, in_flight, masked
    )
    assert error < TOLERANCE[dtype]
