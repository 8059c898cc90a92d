"""Turns a GGUF file of the Llama architecture into a Hugging Face model folder, without torch.

Weights are dequantised once and rounded to bfloat16, bit for bit as transformers' own GGUF loading does;
the tokenizer is rebuilt as the model's authors published it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Weight = npt.NDArray[np.float32]
CONTROL_TOKEN = 3  # GGUF's token type of special tokens
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFError(ValueError):
    """The file is damaged or holds something that this conversion does not know."""


def convert_gguf(source: Path, target: Path) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and their companions into `target`."""
    try:
        reader = GGUFReader(source)
    except (ValueError, OSError) as error:
        raise GGUFError(f"{source} is not a readable GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise GGUFError(f"{source}: architecture {fields.get('general.architecture')!r}, only llama is known")
    target.mkdir(parents=True, exist_ok=True)
    weights = dict(read_weights(reader, fields))
    write_json(target / "config.json", model_config(fields, tied="lm_head.weight" not in weights))
    write_weights(target / "model.safetensors", weights)
    make_tokenizer(fields).save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", tokenizer_config(fields))
    write_json(target / "generation_config.json", special_ids(fields))


def model_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    hidden_size, num_heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": shortest(fields["llama.rope.freq_base"]),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        **special_ids(fields),
    }


def read_weights(reader: GGUFReader, fields: dict[str, Any]) -> Iterator[tuple[str, Weight]]:
    """(name in a Llama checkpoint, float32 weights) of every tensor."""
    num_heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        name, part = checkpoint_name(tensor.name)
        yield name, interleaved_to_halves(weight, num_heads[part]) if part in num_heads else weight


def checkpoint_name(name: str) -> tuple[str, str]:
    """`blk.3.attn_q.weight` -> (`model.layers.3.self_attn.q_proj.weight`, `attn_q`)."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in TENSORS and parts[1] == "weight":
        return f"{TENSORS[parts[0]]}.weight", parts[0]
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_TENSORS and parts[3] == "weight":
        return f"model.layers.{int(parts[1])}.{LAYER_TENSORS[parts[2]]}.weight", parts[2]
    raise GGUFError(f"unknown tensor {name!r}")


def interleaved_to_halves(weight: Weight, num_heads: int) -> Weight:
    """GGUF stores each head's rotary pairs side by side; transformers rotates the two halves of a head."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_weights(path: Path, weights: dict[str, Weight]) -> None:
    """A safetensors file of bfloat16 tensors: length of the header, header, data in the header's order.

    Written by hand because numpy, and so safetensors' numpy interface, has no bfloat16.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, weight in sorted(weights.items()):
        end = begin + 2 * weight.size
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of eight
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, weight in sorted(weights.items()):
            file.write(bfloat16_bytes(weight))


def bfloat16_bytes(weight: Weight) -> bytes:
    """float32 to bfloat16, rounding to nearest even; the values must be finite."""
    if not np.isfinite(weight).all():
        raise GGUFError("a weight is not finite")
    bits = np.ascontiguousarray(weight, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def make_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE that splits digits one by one, as SmolLM's; other kinds are refused."""
    if fields.get("tokenizer.ggml.model") != "gpt2" or fields.get("tokenizer.ggml.pre") != "smollm":
        kind = f"{fields.get('tokenizer.ggml.model')}/{fields.get('tokenizer.ggml.pre')}"
        raise GGUFError(f"tokenizer {kind!r} is not known, only gpt2/smollm: pull the original checkpoint")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == CONTROL_TOKEN]
    )
    return tokenizer


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    ids = special_ids(fields)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def special_ids(fields: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: int(fields[f"tokenizer.ggml.{name}_token_id"]) for key, name in names.items()}


def shortest(value: float) -> float:
    """GGUF keeps float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
