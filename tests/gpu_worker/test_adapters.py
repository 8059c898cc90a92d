"""Adapters side by side in one batch, and their files on the way from and to PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from services.gpu_worker.baseline import add_bottlenecks
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.requests import InvalidRequest
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.adapter_pool import AdapterPool
from services.gpu_worker.model.adapters import AdapterWeights
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.parameters import parameters
from services.gpu_worker.model.peft import (
    BottleneckConfig,
    Ia3Config,
    InvalidAdapter,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
)
from services.gpu_worker.model.peft_files import method_from_peft, read_peft
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import generate, make_adapter, make_engine, prompt_of, run
from tests.gpu_worker.oracle import trainable_tensors
from tests.gpu_worker.training import make_dataset

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS: dict[str, Method] = {
    "a": LoraConfig(2, 8.0, ("q_proj", "v_proj")),
    "b": LoraConfig(16, 8.0, ALL),
    "c": LoraConfig(3, 8.0, ("down_proj",)),
    "d": LoraConfig(8, 8.0, ("k_proj", "gate_proj", "o_proj"), rslora=True),
    "e": LoraConfig(1, 1.0, ("up_proj", "q_proj")),
    "f": LoraConfig(4, 8.0, ALL, dora=True),
    "g": LoraConfig(4, 8.0, ("q_proj", "embed_tokens", "lm_head")),
    "h": Ia3Config(),
    "i": Ia3Config(ALL, ("o_proj", "down_proj")),
    "j": BottleneckConfig(8, activation="silu"),
    "k": BottleneckConfig(8, ("q_proj", "gate_proj", "down_proj"), "gelu", 0.5, parallel=True),
    "l": PrefixConfig(7),
    "m": PromptConfig(7),
}
STRONG = {"a": 0.4, "c": 0.4, "e": 0.8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen2", tied=False)


def digest_of(name: str) -> str:
    return name * 64


def files_of(engine: Engine, name: str) -> dict[str, bytes]:
    return make_adapter(engine.model.config, ADAPTERS[name], seed=ord(name), std=STRONG.get(name, 0.2))


def load_all(engine: Engine) -> None:
    for name in ADAPTERS:
        engine.load_adapter(digest_of(name), files_of(engine, name))


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_in_peft(folder: Path, files: dict[str, bytes], path: Path) -> Any:
    """PEFT reads our files as they are; of bottlenecks, which it has none of, the values are copied."""
    path.mkdir(exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    model = base_model(folder)
    settings, config = json.loads(files["adapter_config.json"]), ModelConfig.from_folder(folder)
    if settings["peft_type"] != "BOTTLENECK":
        return PeftModel.from_pretrained(model, path).eval()
    method = method_from_peft(settings, config)
    assert isinstance(method, BottleneckConfig)
    model = add_bottlenecks(model, method, torch.float32)
    values, tensors = trainable_tensors(model, method, config), load(files["adapter_model.safetensors"])
    with torch.no_grad():
        for parameter in parameters(config, method):
            values[parameter.layer, parameter.key].copy_(tensors[parameter.file_name])
    return model.eval()


def assert_greedy(model: Any, prompt: list[int], output: list[int]) -> None:
    """Every token is the likeliest after those before it."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + output])).logits[0, -len(output) - 1 : -1]
    assert logits.argmax(-1).tolist() == output


@pytest.mark.parametrize("training", [False, True])
def test_adapters_of_every_method_share_a_batch(folder: Path, tmp_path: Path, training: bool) -> None:
    engine = make_engine(folder, num_blocks=512, scheduler={"max_num_seqs": 32})
    load_all(engine)
    if training:
        dataset = make_dataset([40, 30], engine.model.config.vocab_size)
        engine.add_job("ftjob-1", JobConfig(n_epochs=500), LoraConfig(4, 8.0, ALL), dataset)
        engine.add_job("ftjob-2", JobConfig(n_epochs=500), Ia3Config(), dataset)
        engine.add_job("ftjob-3", JobConfig(n_epochs=500), PrefixConfig(3), dataset)
    wanted = [*"abcde", None, *"fghijklm", None, *"balm"]
    prompts = [prompt_of(engine, 3 + 2 * i, seed=i) for i in range(len(wanted))]
    for index, name in enumerate(wanted):
        adapter = digest_of(name) if name else None
        engine.add(f"r{index}", prompts[index], Sampling(max_tokens=10), adapter=adapter)
    outputs, _ = run(engine, *[f"r{i}" for i in range(len(wanted))])
    reference: dict[str | None, Any] = {None: base_model(folder)}
    for name in ADAPTERS:
        reference[name] = load_in_peft(folder, files_of(engine, name), tmp_path / name)
    for index, name in enumerate(wanted):
        assert_greedy(reference[name], prompts[index], outputs[f"r{index}"].tokens)
    assert len({tuple(output.tokens) for output in outputs.values()}) == len(wanted)


@pytest.mark.parametrize("name", ADAPTERS)
def test_our_files_give_the_same_logits_in_peft(folder: Path, tmp_path: Path, name: str) -> None:
    engine = make_engine(folder)
    load_all(engine)
    prompt = prompt_of(engine, 24)
    peft = load_in_peft(folder, files_of(engine, name), tmp_path / "adapter")
    assert_same_logprobs(engine, digest_of(name), peft, prompt)


PEFT_CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=5, lora_alpha=13, target_modules=["q_proj", "o_proj"], lora_dropout=0.1),
    "dora": peft.LoraConfig(r=5, lora_alpha=13, target_modules=["q_proj", "down_proj"], use_dora=True),
    "vocabulary": peft.LoraConfig(r=5, target_modules=["v_proj", "embed_tokens", "lm_head"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", PEFT_CONFIGS)
def test_files_that_peft_saved_give_the_same_logits_here(
    folder: Path, tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    model = peft.get_peft_model(base_model(folder), PEFT_CONFIGS[method])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
                parameter.data = parameter.data.to(dtype).float()
    model.eval().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(save({key: value.to(dtype) for key, value in load(path.read_bytes()).items()}))
    files = {name: (tmp_path / name).read_bytes() for name in ("adapter_config.json", path.name)}
    engine = make_engine(folder)
    engine.load_adapter(digest_of("a"), files)
    assert_same_logprobs(engine, digest_of("a"), model, prompt_of(engine, 24))


def assert_same_logprobs(engine: Engine, digest: str, model: Any, prompt: list[int]) -> None:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -len(prompt) :]
        expected = torch.log_softmax(logits, -1)
    sampling = Sampling(max_tokens=0, prompt_logprobs=0)
    ours = generate(engine, prompt, sampling, adapter=digest).prompt_logprobs
    assert ours is not None
    for position, entry in enumerate(ours[1:]):
        assert entry is not None
        assert entry.logprob == pytest.approx(float(expected[position, prompt[position + 1]]), abs=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_exported_job_is_read_back_as_the_weights_that_were_trained(folder: Path, name: str) -> None:
    engine = make_engine(folder)
    dataset = make_dataset([20, 20], engine.model.config.vocab_size)
    config = JobConfig(batch_size=1, learning_rate=0.01, n_epochs=3)
    engine.add_job("ftjob-1", config, ADAPTERS[name], dataset)
    prompt, sampling = prompt_of(engine, 12), Sampling(max_tokens=0, prompt_logprobs=0)
    trainer = engine.runner.trainers["ftjob-1"]
    start = trainer.parameters.flat.clone()
    run(engine)
    assert not torch.equal(trainer.parameters.flat, start)
    weights = read_peft(engine.model.weights, engine.export_job("ftjob-1", "tiny"), 16)
    engine.adapters.load(digest_of("x"), weights)
    engine.adapters.load(digest_of("y"), trainer.parameters.weights)
    found = [generate(engine, prompt, sampling, adapter=digest_of(who)).prompt_logprobs for who in "xy"]
    assert found[0] == found[1] and found[0] != generate(engine, prompt, sampling).prompt_logprobs


# --- the pool


def make_pool(folder: Path, capacity: int) -> tuple[AdapterPool, Callable[[], AdapterWeights]]:
    engine = make_engine(folder)
    files = files_of(engine, "a")
    return AdapterPool(capacity), lambda: read_peft(engine.model.weights, files, 8)


def test_the_least_recently_used_adapter_leaves_first(folder: Path) -> None:
    pool, weights = make_pool(folder, 2)
    pool.load("x", weights())
    pool.load("y", weights())
    pool.pin("x")
    pool.unpin("x")
    pool.load("z", weights())
    assert "x" in pool and "y" not in pool and "z" in pool and len(pool) == 2


def test_an_adapter_in_use_stays(folder: Path) -> None:
    pool, weights = make_pool(folder, 2)
    pool.load("x", weights())
    pool.load("y", weights())
    for _ in range(2):
        pool.pin("x")
    pool.unpin("x")
    pool.load("z", weights())
    assert "x" in pool and "y" not in pool
    pool.pin("z")
    assert not pool.can_load()
    pool.unpin("z")
    assert pool.can_load()


def test_requests_pin_their_adapters_and_let_go_at_the_end(folder: Path) -> None:
    engine = make_engine(folder, max_adapters=1)
    engine.load_adapter(digest_of("a"), files_of(engine, "a"))
    engine.add("r1", [5, 6], Sampling(max_tokens=3), adapter=digest_of("a"))
    engine.add("r2", [5, 6], Sampling(max_tokens=30), adapter=digest_of("a"))
    with pytest.raises(InvalidRequest, match="1 adapter slots"):
        engine.load_adapter(digest_of("b"), files_of(engine, "b"))
    run(engine, "r1")
    engine.abort("r2")
    engine.load_adapter(digest_of("b"), files_of(engine, "b"))
    assert digest_of("a") not in engine.adapters
    with pytest.raises(InvalidRequest, match="not loaded"):
        engine.add("r3", [5, 6], Sampling(max_tokens=3), adapter=digest_of("a"))


def test_an_adapter_that_overflows_spoils_its_own_answers_only(folder: Path) -> None:
    engine = make_engine(folder)
    engine.load_adapter(digest_of("f"), make_adapter(engine.model.config, LoraConfig(4, 8.0, ALL), std=1e30))
    prompt, sampling = prompt_of(engine, 21), Sampling(max_tokens=12, logprobs=1)
    calm = generate(engine, prompt, sampling)
    engine.add("wild", prompt, Sampling(max_tokens=40, temperature=1.0, top_p=0.9), adapter=digest_of("f"))
    engine.add("mild", prompt, sampling, cache_salt="other")
    outputs, _ = run(engine, "wild", "mild")
    assert outputs["mild"].tokens == calm.tokens
    assert generate(engine, prompt, sampling, cache_salt="later").tokens == calm.tokens


# --- files that do not fit


def change_config(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def apply(files: dict[str, bytes]) -> None:
        config = {**json.loads(files["adapter_config.json"]), **changes}
        kept = {name: value for name, value in config.items() if value is not ...}
        files["adapter_config.json"] = json.dumps(kept).encode()

    return apply


def change_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[dict[str, bytes]], None]:
    def apply(files: dict[str, bytes]) -> None:
        tensors = load(files["adapter_model.safetensors"])
        edit(tensors)
        files["adapter_model.safetensors"] = save(tensors)

    return apply


def set_bytes(name: str, data: bytes | None) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.pop(name) and None if data is None else files.update({name: data})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "other method": (change_config(peft_type="LOHA"), "LOHA"),
    "another's settings": (change_config(peft_type="IA3"), "is not supported"),
    "dora without magnitudes": (change_config(use_dora=True), "lora_magnitude_vector"),
    "pattern": (change_config(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "saved modules": (change_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "transposed": (change_config(fan_in_fan_out=True), "fan_in_fan_out"),
    "bias": (change_config(bias="all"), "bias"),
    "bias of B": (change_config(lora_bias=True), "lora_bias"),
    "changed base": (change_config(init_lora_weights="pissa_niter_4"), "pissa"),
    "a setting of the future": (change_config(use_newthing=True), "use_newthing"),
    "unknown target": (change_config(target_modules=["q_proj", "c_attn"]), "target_modules"),
    "pattern of targets": (change_config(target_modules=".*_proj"), "target_modules"),
    "rank of words": (change_config(r="many"), "r 'many'"),
    "no rank": (change_config(r=...), "r None"),
    "rank beyond the limit": (change_config(r=129), "129"),
    "alpha is not a number": (change_config(lora_alpha=float("nan")), "lora_alpha"),
    "another rank": (change_config(r=5), "shape"),
    "a list": (set_bytes("adapter_config.json", b"[]"), "adapter_config.json"),
    "no json": (set_bytes("adapter_config.json", b"{"), "adapter_config.json"),
    "no config": (set_bytes("adapter_config.json", None), "adapter_config.json"),
    "no weights": (set_bytes("adapter_model.safetensors", None), "adapter_model.safetensors"),
    "no safetensors": (
        set_bytes("adapter_model.safetensors", b"\x80\x04pickle"),
        "adapter_model.safetensors",
    ),
    "missing tensor": (change_tensors(lambda t: t.pop(FIRST)), "q_proj.lora_A"),
    "extra tensor": (change_tensors(lambda t: t.update(extra=torch.zeros(1))), "extra"),
    "wrong shape": (change_tensors(lambda t: t.update({FIRST: torch.zeros(2, 63)})), "shape"),
    "not a number": (change_tensors(lambda t: t[FIRST].fill_(float("nan"))), "not finite"),
    "infinite": (change_tensors(lambda t: t[FIRST].fill_(float("inf"))), "not finite"),
    "integers": (change_tensors(lambda t: t.update({FIRST: t[FIRST].long()})), "int64"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_adapter_that_does_not_fit_is_refused_by_name(folder: Path, case: str) -> None:
    engine = make_engine(folder)
    files = files_of(engine, "a")
    spoil, words = HOSTILE[case]
    spoil(files)
    with pytest.raises(InvalidAdapter, match=words):
        engine.load_adapter(digest_of("a"), files)
    assert digest_of("a") not in engine.adapters


def test_an_adapter_of_a_model_with_more_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    other = make_engine(make_tiny_model(tmp_path / "deeper", "qwen2", num_layers=3))
    with pytest.raises(InvalidAdapter, match=r"unexpected tensor .*layers\.2"):
        make_engine(folder).load_adapter(digest_of("a"), files_of(other, "a"))
