"""`flexllm plan` as an operator meets it; what it computes is tested in tests/gpu_worker/test_plan.py."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from services.cli import app
from services.errors import OperatorError
from shared.config import Settings
from tests.builders import make_tiny_model

DOCUMENT = Path(__file__).parent.parent.parent / "docs/plans.md"


UNIT = re.compile("bytes|flops|percent|_us_|tokens")
COUNTS = ("num_layers", "num_parameters", "kept_in_layers", "tensor_parallel", "dropout")


def plan(*args: str) -> str:
    outcome = CliRunner().invoke(app, ["plan", *args], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number with the name under which it stands; names that are data take that of what holds them."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from numbers(each, name if UNIT.search(name) else key)
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def test_the_documents_plan_is_what_the_command_prints() -> None:
    printed = "\n".join(line.rstrip() for line in plan("--model", "Llama-3.1-8B").splitlines())
    assert printed.strip() in DOCUMENT.read_text(), "docs/plans.md is out of date: run `make docs-plans`"


@pytest.mark.parametrize(
    "options",
    [
        ["--dora", "--rank", "8", "--tp", "2", "--budget", "0.001"],
        ["--peft", "bottleneck", "--size", "16", "--parallel", "--activation", "gelu"],
        ["--peft", "prefix_tuning", "--virtual-tokens", "4", "--quantise", "int8", "--hardware", "cpu"],
        ["--targets", "lm_head"],
    ],
)
def test_tables_fit_a_terminal(folder: str, options: list[str]) -> None:
    lines = plan("--model", folder, "--seq", "64", "--window", "16", *options).splitlines()
    assert max(map(len, lines)) <= 110
    titles = {"Tensors of a layer", "Memory", "What each step saves"}
    assert titles <= {line.strip() for line in lines}


def test_numbers_for_machines_have_units_in_their_names(folder: str) -> None:
    config = str(Path(folder) / "config.json")
    found = json.loads(plan("--model", config, "--peft", "ia3", "--seq", "64", "--window", "16", "--json"))
    assert found["request"]["method"]["type"] == "ia3"
    assert found["request"]["sequence_tokens"] == 64
    for name, value in numbers({key: found[key] for key in found.keys() - {"operations"}}):
        assert name in COUNTS or UNIT.search(name), f"{name} = {value}"
    windows = found["ablation"][-2]
    assert all(saved > 50 for saved in windows["saved_percent_of_peak"].values())


def test_a_plan_is_for_the_windows_of_a_worker_unless_told_otherwise(folder: str) -> None:
    found = json.loads(plan("--model", folder, "--seq", "64", "--json"))
    assert found["request"]["window_tokens"] == Settings.model_fields["finetune_window"].default


def test_the_generated_programs_are_python(folder: str) -> None:
    printed = plan("--model", folder, "--seq", "64", "--code")
    functions = [node for node in ast.parse(printed).body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == ["forward", "forward"]
    assert printed.startswith("# layer 0\n") and "# layer 1\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "GPT-2"],
            r"'GPT-2' is no model folder, no config.json and none of Llama-3\.1-8B, .*Qwen",
        ),
        (["--tp", "3"], "3 ranks: they cannot share 2 key/value heads evenly"),
        (["--targets", "q_proj,c_attn"], "--targets c_attn: Input should be 'q_proj'"),
        (["--targets", "lm_head", "--dora"], "use_dora is not for embed_tokens or lm_head"),
        (["--rank", "0"], "--rank 0: Input should be greater than or equal to 1"),
        (["--peft", "ia3", "--rank", "4"], "--rank is no option of ia3"),
        (["--peft", "bottleneck", "--dora"], "--dora is no option of bottleneck"),
        (["--seq", "100000"], "a sequence of 100000 tokens: the model has 2048 positions"),
        (
            ["--peft", "prefix_tuning", "--virtual-tokens", "40", "--seq", "32"],
            "of which the method takes 40",
        ),
    ],
)
def test_bad_input_is_refused_with_what_is_wrong(folder: str, options: list[str], message: str) -> None:
    named = options if "--model" in options else ["--model", folder, *options]
    with pytest.raises(OperatorError, match=message):
        plan(*named)


def test_a_configuration_that_says_too_little_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(OperatorError, match="has no 'num_attention_heads'"):
        plan("--model", str(config))
    config.write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(OperatorError, match="architecture 'GPT2LMHeadModel' is not one of LlamaForCausalLM"):
        plan("--model", str(config))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(OperatorError, match=r"empty has no config\.json"):
        plan("--model", str(empty))


# --- what rounding costs


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    turns = [("What is four plus six?", "4 + 6 = 10"), ("And a pair of them?", "Two tens are 20.")]
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in turns
    ]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def perplexity_by_transformers(folder: str, chats: Path) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in chats.read_text().splitlines():
        tokens = tokenizer.apply_chat_template(json.loads(line)["messages"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = model(tokens, labels=tokens).loss
        total, count = total + float(loss) * (tokens.shape[1] - 1), count + tokens.shape[1] - 1
    return math.exp(total / count)


def test_the_perplexity_of_every_form_of_the_weights_is_measured(folder: str, chats: Path) -> None:
    printed = plan("--model", folder, "--dtype", "float32", "--texts", str(chats), "--json", "--seq", "64")
    found = json.loads(printed)["weights"]["perplexity_by_form"]
    assert found["none"] == pytest.approx(perplexity_by_transformers(folder, chats), rel=1e-5)
    assert found.keys() == {"none", "int8", "int4"}
    rounding = {form: abs(value / found["none"] - 1) for form, value in found.items()}
    assert 0 < rounding["int8"] < rounding["int4"] < 0.5
    table = plan("--model", folder, "--dtype", "float32", "--texts", str(chats), "--seq", "64")
    assert f"perplexity {found['int4']:.3f}" in table


def test_texts_that_cannot_be_scored_are_refused_with_their_place(folder: str, chats: Path) -> None:
    with pytest.raises(OperatorError, match=r"Llama-3\.1-8B has no weights to measure"):
        plan("--model", "Llama-3.1-8B", "--texts", str(chats))
    with pytest.raises(OperatorError, match=r"--texts .*missing.jsonl: .*No such file"):
        plan("--model", folder, "--texts", "missing.jsonl")
    chats.write_text(chats.read_text() + '{"prompt": "four"}\n')
    with pytest.raises(OperatorError, match="line 3: no chat with messages"):
        plan("--model", folder, "--texts", str(chats))
    chats.write_text("")
    with pytest.raises(OperatorError, match="no text"):
        plan("--model", folder, "--texts", str(chats))
