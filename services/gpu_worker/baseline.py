"""What transformers + peft keep for the backward pass: measured on the real code, with tensors that hold nothing.

The model is built on the meta device and run on torch's fake tensors: every operation of the forward is
dispatched as on a CPU, but computes shapes only. So a 70B model is measured in seconds and without memory,
and no figure here comes from a formula of ours.
"""

from __future__ import annotations

import importlib
import math
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.peft import (
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    Method,
    PrefixConfig,
    PromptConfig,
    check_method,
)

AdapterDtype = Literal["model", "float32"]  # peft's default is float32 on a bfloat16 model
ADAPTER_DTYPES: tuple[AdapterDtype, ...] = ("model", "float32")


class BaselineUnavailable(RuntimeError):
    """peft is not installed, so there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class AutogradBytes:
    """What autograd keeps of one sequence from the forward to the backward, parameters excluded."""

    num_tokens: int
    per_layer: int  # that one more layer keeps of the whole sequence
    outside: int  # final norm and rotary tables, less what the first layer need not keep: may be negative

    @property
    def per_layer_token(self) -> float:
        return self.per_layer / self.num_tokens

    def total(self, num_layers: int) -> int:
        """Of a model of so many layers, at the moment when it has its logits."""
        return num_layers * self.per_layer + self.outside


@dataclass(frozen=True, slots=True)
class LogitsBytes:
    """The vocabulary's side of one training step."""

    kept: int  # from the forward to the backward
    peak: int  # at its highest: logits, their float32 copies and gradients


def autograd_bytes(
    hf_config: dict[str, Any],
    method: Method,
    *,
    num_tokens: int,
    adapter_dtype: AdapterDtype,
    dtype: torch.dtype = torch.bfloat16,
) -> AutogradBytes:
    """What the model of this `config.json` keeps of a sequence of `num_tokens` with sdpa attention.

    Measured with two and three layers: from the second on, each keeps the same. It grows with the tokens, but for
    prefix tuning: transformers then builds a mask of tokens by keys, and every layer keeps a copy of it.
    Raises InvalidAdapter, UnsupportedModel or BaselineUnavailable.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens {num_tokens} is not positive")
    two, three = (
        _fake_saved_bytes(hf_config, method, num_layers, num_tokens, adapter_dtype, dtype)
        for num_layers in (2, 3)
    )
    return AutogradBytes(num_tokens, per_layer=three - two, outside=3 * two - 2 * three)


def checkpointing_bytes(
    hf_config: dict[str, Any], method: Method, plain: AutogradBytes, dtype: torch.dtype = torch.bfloat16
) -> int | None:
    """Of the same with gradient checkpointing: every layer's input, and one layer's `plain` while it is computed
    again. None where peft refuses it: it cannot give a layer its prefix a second time."""
    if isinstance(method, PrefixConfig):
        return None
    config = ModelConfig.from_hf(hf_config)
    rows = plain.num_tokens + (method.num_virtual_tokens if isinstance(method, PromptConfig) else 0)
    return config.num_layers * rows * config.hidden_size * dtype.itemsize + plain.per_layer


def logits_bytes(
    hf_config: dict[str, Any], num_tokens: int, dtype: torch.dtype = torch.bfloat16
) -> LogitsBytes:
    """Head and loss of transformers, forward and backward, for a caller who keeps the loss alone."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    config = ModelConfig.from_hf(hf_config)
    with FakeTensorMode():
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype).requires_grad_(False)
        hidden = torch.empty(1, num_tokens, config.hidden_size, dtype=dtype, requires_grad=True)
        labels = torch.zeros(1, num_tokens, dtype=torch.int64)
        with LiveBytes() as live:
            loss = ForCausalLMLoss(head(hidden), labels, config.vocab_size)
            kept = live.now
            loss.backward()
    return LogitsBytes(kept, live.peak)


def _fake_saved_bytes(
    hf_config: dict[str, Any],
    method: Method,
    num_layers: int,
    num_tokens: int,
    adapter_dtype: AdapterDtype,
    dtype: torch.dtype,
) -> int:
    with torch.device("meta"):
        model = make_peft_model(hf_config, method, num_layers, adapter_dtype=adapter_dtype, dtype=dtype)
        for (
            parameter
        ) in model.parameters():  # peft leaves adapters as they were drawn when they have no values
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype if adapter_dtype == "model" else torch.float32)
    with FakeTensorMode(
        allow_non_fake_inputs=True
    ):  # peft holds the numbers of virtual tokens as a plain tensor
        model.to_empty(device="cpu")
        tokens = torch.zeros(1, num_tokens, dtype=torch.int64)
        # With a cache transformers sees that nothing is packed without looking at values, which there are none of.
        return saved_bytes(model, tokens, use_cache=True)


class _Saved:
    """Holds a saved tensor for as long as the graph does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, tokens: Tensor, **options: Any) -> int:
    """Bytes of the storages that the graph of `model(tokens).logits` holds beside parameters and buffers."""
    held: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        held.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        logits = model(input_ids=tokens, **options).logits
    # What an abandoned part of the graph held is gone by now, and not counted.
    own = {_storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    sizes = {_storage_key(saved.tensor): saved.tensor.untyped_storage().nbytes() for saved in held}
    assert logits.grad_fn is not None  # and with it the graph was alive up to here
    return sum(size for key, size in sizes.items() if key not in own)


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is entered: those alive `now`, and at the `peak`."""

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        """Those of `given`, which outlive it, count nowhere, whoever makes tensors of them."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = {_storage_key(tensor) for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage_key(leaf) not in before | self._known:
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


# --- the models


def make_peft_model(
    hf_config: dict[str, Any],
    method: Method,
    num_layers: int | None = None,
    *,
    adapter_dtype: AdapterDtype = "float32",
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """An untrained transformers model with the method on it, ready to train, on torch's default device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_method(method, ModelConfig.from_hf(hf_config))
    if not hf_config.get("model_type"):
        raise ValueError("config.json has no model_type, by which transformers knows the model's class")
    settings = {k: v for k, v in hf_config.items() if k not in ("model_type", "layer_types")}
    if num_layers is not None:
        settings["num_hidden_layers"] = num_layers
    config = AutoConfig.for_model(hf_config["model_type"], **settings)
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=dtype, attn_implementation="sdpa")
    if isinstance(method, BottleneckConfig):
        return add_bottlenecks(model, method, dtype if adapter_dtype == "model" else torch.float32).train()
    get_peft_model = _import_peft().get_peft_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(
            model, peft_config(method), autocast_adapter_dtype=adapter_dtype == "float32"
        )
    return wrapped.train()


def _import_peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise BaselineUnavailable(
            "the baseline is measured on peft: install it with `pip install peft`"
        ) from error


def peft_config(method: Method) -> Any:
    """The method as peft spells it; bottleneck adapters it has none of."""
    peft = _import_peft()
    if isinstance(method, LoraConfig):
        return peft.LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            target_modules=list(method.targets),
            use_rslora=method.rslora,
            use_dora=method.dora,
        )
    if isinstance(method, Ia3Config):
        return peft.IA3Config(
            target_modules=list(method.targets), feedforward_modules=list(method.feedforward)
        )
    assert isinstance(method, PrefixConfig | PromptConfig)
    kind = peft.PrefixTuningConfig if isinstance(method, PrefixConfig) else peft.PromptTuningConfig
    return kind(task_type="CAUSAL_LM", **asdict(method))


class BottleneckLinear(nn.Module):
    """A frozen linear with a bottleneck adapter as BottleneckConfig says; peft has none of its own."""

    def __init__(self, base_layer: nn.Linear, config: BottleneckConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer, self.config = base_layer, config
        width = base_layer.in_features if config.parallel else base_layer.out_features
        device = base_layer.weight.device
        self.adapter_down = nn.Linear(width, config.size, device=device, dtype=dtype)
        self.adapter_up = nn.Linear(config.size, base_layer.out_features, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(self.adapter_down.weight, a=math.sqrt(5))
        for constant in (self.adapter_down.bias, self.adapter_up.weight, self.adapter_up.bias):
            nn.init.zeros_(constant)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        source = (x if self.config.parallel else y).to(self.adapter_down.weight.dtype)
        activate = getattr(nn.functional, self.config.activation)  # relu, gelu, silu or tanh
        hidden = activate(self.adapter_down(source))
        update: Tensor = self.adapter_up(hidden) * self.config.scaling
        return y + update.to(y.dtype)


def add_bottlenecks(model: Any, config: BottleneckConfig, dtype: torch.dtype) -> Any:
    """Freezes the model and puts an adapter on every target linear; returns the model."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in config.targets and isinstance(child, nn.Linear):
                setattr(parent, name, BottleneckLinear(child, config, dtype))
    return model
