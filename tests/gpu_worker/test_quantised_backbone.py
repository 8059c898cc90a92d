"""A quantised backbone is the dense model of its own weights: in what it generates and in every gradient."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.kernels.quantised import SCHEMES, QuantisedLinear, Scheme, quantise
from services.gpu_worker.model.config import UnsupportedModel
from services.gpu_worker.model.peft import LoraConfig, projections
from services.gpu_worker.model.transformer import Transformer
from services.gpu_worker.model.weights import load_weights
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import generate, make_engine, prompt_of
from tests.gpu_worker.oracle import batch_loss, copy_to, exact_norms, make_peft, trainable_tensors
from tests.gpu_worker.training import advance, make_dataset, make_trainer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = {"lora": LoraConfig(4, 6.0, TARGETS), "dora": LoraConfig(4, 6.0, TARGETS, dora=True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(root / name, name, num_layers=3) for name in ("llama", "qwen2")}


def make_quantised(folder: Path, scheme: Scheme, dtype: torch.dtype) -> Transformer:
    weights = load_weights(folder, dtype, torch.device("cpu"), partial(quantise, scheme=scheme))
    return Transformer(weights, max_position=512)


def write_dense(model: Transformer, source: Path, folder: Path) -> Path:
    """A copy of a float32 checkpoint with the weights that the quantised model computes with."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for index, layer in enumerate(model.weights.layers):
        for p in projections(model.config).values():
            weight = layer.linear(p.group).dense()[p.rows]
            tensors[f"model.layers.{index}.{p.path}.weight"] = weight.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def copy_dense(model: Transformer, oracle: Any) -> None:
    """Puts the quantised model's weights under the oracle's adapters."""
    modules = dict(oracle.named_modules())
    for index, layer in enumerate(model.weights.layers):
        for p in projections(model.config).values():
            base = modules[f"base_model.model.model.layers.{index}.{p.path}.base_layer"]
            base.weight.data.copy_(layer.linear(p.group).dense()[p.rows])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_equal_autograd_over_the_dense_weights(
    folders: dict[str, Path], scheme: Scheme, architecture: str, method: str
) -> None:
    folder, config = folders[architecture], METHODS[method]
    model = make_quantised(folder, scheme, torch.float64)
    dataset = make_dataset([37, 22, 5], model.config.vocab_size)
    trainer = make_trainer(
        model, dataset, method=config, config=JobConfig(batch_size=3), max_tokens_in_flight=48
    )
    with exact_norms():
        oracle = make_peft(folder, torch.float64, config)
        copy_dense(model, oracle)
        copy_to(trainer, oracle)
        loss = batch_loss(oracle, dataset, [0, 1, 2])
        loss.backward()
    sizes = random.Random(1)
    advance(trainer, lambda: sizes.randint(1, 40))

    assert trainer._total.means().read()[0] == pytest.approx(float(loss.detach()), rel=1e-9)
    for key, parameter in trainable_tensors(oracle, config, model.config).items():
        ours = trainer.parameters.gradients[key]
        torch.testing.assert_close(ours, parameter.grad.view(ours.shape), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_engine_generates_what_the_dense_weights_would(
    folders: dict[str, Path], scheme: Scheme, tmp_path: Path
) -> None:
    quantised = make_engine(folders["llama"], quantise=scheme)
    twin = write_dense(
        make_quantised(folders["llama"], scheme, torch.float32), folders["llama"], tmp_path / "t"
    )
    dense = make_engine(twin)
    sampling = Sampling(max_tokens=24, logprobs=0)
    for length in (3, 50, 90):
        ours, theirs = (
            generate(engine, prompt_of(engine, length), sampling) for engine in (quantised, dense)
        )
        assert ours.tokens == theirs.tokens
        assert [x.logprob for x in ours.logprobs] == pytest.approx(
            [x.logprob for x in theirs.logprobs], abs=1e-4
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_the_layers_linears_are_quantised_and_take_fewer_bytes(
    folders: dict[str, Path], scheme: Scheme
) -> None:
    dense = load_weights(folders["llama"], torch.float32, torch.device("cpu"))
    quantised = make_quantised(folders["llama"], scheme, torch.float32).weights
    assert torch.equal(dense.embedding, quantised.embedding)
    assert torch.equal(dense.head.dense(), quantised.head.dense())
    saved = 0
    for before, after in zip(dense.layers, quantised.layers, strict=True):
        for group in ("qkv", "o", "gate_up", "down"):
            assert isinstance(after.linear(group), QuantisedLinear)
            saved += before.linear(group).size_bytes - after.linear(group).size_bytes
    assert dense.size_bytes - quantised.size_bytes == saved > 0


def test_a_model_that_the_group_size_does_not_divide_is_refused_by_the_tensor(
    folders: dict[str, Path],
) -> None:
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn\.q_proj .* group size 48"):
        make_engine(folders["llama"], quantise="int4", int4_group_size=48)
