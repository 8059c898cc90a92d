"""What is known of the kernels without triton: their types, and sizes that decide what a call allocates."""

from __future__ import annotations

import torch

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
LOW_RANK_PART = 2048  # features of a row that one program sums on their way to the ranks
LOSS_ROWS = 1024  # whose cross-entropy one launch measures
LOSS_TOKENS = 128  # of the vocabulary, a program


class UnsupportedShape(ValueError):
    """A kernel that was asked for has no form for these shapes or types."""


def loss_piece(vocabulary: int, num_rows: int, max_logits: int) -> int:
    """Tokens whose logits' gradient exists at a time."""
    return min(vocabulary, max(LOSS_TOKENS, max_logits // num_rows // LOSS_TOKENS * LOSS_TOKENS))
