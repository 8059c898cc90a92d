"""A Llama folder as a GGUF file without a tokenizer: all that llama.cpp needs to be timed on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file

from services.gguf_convert import LAYER_TENSORS, TENSORS
from services.gpu_worker.model.config import ModelConfig

Weights = Literal["bfloat16", "int8"]
KINDS = {"bfloat16": GGMLQuantizationType.BF16, "int8": GGMLQuantizationType.Q8_0}
GGUF_NAMES = {theirs: ours for ours, theirs in TENSORS.items()}
GGUF_LAYER_NAMES = {theirs: ours for ours, theirs in LAYER_TENSORS.items()}
QUERIES, KEYS = "self_attn.q_proj", "self_attn.k_proj"


def write_gguf(folder: Path, path: Path, weights: Weights) -> None:
    """int8 means the layers' linears, in blocks of 32 (Q8_0); embedding and head stay bfloat16, as ours do."""
    config = ModelConfig.from_folder(folder)
    if config.qkv_bias or config.qk_norm or config.rope.kind != "default":
        raise ValueError(f"{folder}: only llama without scaled positions can be written")
    writer = GGUFWriter(path, "llama")
    _add_settings(writer, config)
    for name, tensor in load_file(folder / "model.safetensors").items():
        _add_tensor(writer, config, name, tensor.float().numpy(), KINDS[weights])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_settings(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tensor(
    writer: GGUFWriter,
    config: ModelConfig,
    name: str,
    tensor: npt.NDArray[np.float32],
    kind: GGMLQuantizationType,
) -> None:
    part = name.removesuffix(".weight").split(".", 3)[-1]
    if part == QUERIES:
        tensor = halves_to_interleaved(tensor, config.num_heads)
    if part == KEYS:
        tensor = halves_to_interleaved(tensor, config.num_kv_heads)
    if tensor.ndim == 1:
        kind = GGMLQuantizationType.F32
    elif not name.startswith("model.layers."):
        kind = GGMLQuantizationType.BF16
    data = tensor if kind is GGMLQuantizationType.F32 else quantize(tensor, kind)
    writer.add_tensor(gguf_name(name), data, raw_dtype=kind)


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    path = name.removesuffix(".weight")
    if path.startswith("model.layers."):
        _, _, layer, part = path.split(".", 3)
        return f"blk.{layer}.{GGUF_LAYER_NAMES[part]}.weight"
    return f"{GGUF_NAMES[path]}.weight"


def halves_to_interleaved(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """GGUF has each head's rotary pairs side by side; transformers rotates the two halves of a head."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
