"""What the comparison with other engines rests on: the same weights, and counts that mean what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.torch import load_file

from benchmarks.peers.gguf_file import Weights, write_gguf
from benchmarks.peers.turns import OURS, Run, best, compared
from services.gguf_convert import read_weights
from tests.builders import make_tiny_model


@pytest.mark.parametrize(("weights", "error"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_weights_written_for_llama_cpp_are_those_of_the_model(
    tmp_path: Path, weights: Weights, error: float
) -> None:
    folder = make_tiny_model(tmp_path / "tiny", "llama")
    write_gguf(folder, tmp_path / "model.gguf", weights)
    reader = GGUFReader(tmp_path / "model.gguf")
    written = dict(read_weights(reader, {name: field.contents() for name, field in reader.fields.items()}))
    model = load_file(folder / "model.safetensors")
    assert written.keys() == model.keys()
    for name, weight in model.items():
        largest = float(weight.abs().max())
        np.testing.assert_allclose(written[name], weight.float().numpy(), rtol=0, atol=error * largest)


def test_a_model_that_is_no_llama_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny", "qwen2")
    with pytest.raises(ValueError, match="only llama"):
        write_gguf(folder, tmp_path / "model.gguf", "bfloat16")


def test_the_best_of_the_rounds_counts_and_equal_tokens_are_told() -> None:
    seconds = iter([2.0, 8.0, 4.0, 4.0])  # the sides take turns

    def side(*tokens: int) -> Run:
        return Run(4, next(seconds), [list(tokens)])

    row = compared(best(2, {OURS: lambda: side(1, 2, 3, 4), "peer": lambda: side(1, 2, 9, 4)}))
    assert row["tokens_per_s"] == {OURS: 2.0, "peer": 1.0}
    assert row["ratio"] == {"peer": 2.0}
    assert row["equal_tokens"] == {"peer": 0.75}
