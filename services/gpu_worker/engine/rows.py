"""How a batch is laid out as the rows of one flat stream."""

from __future__ import annotations

from dataclasses import dataclass

from services.gpu_worker.engine.batch import Batch, Chunk, JobWindow


@dataclass(slots=True)
class Rows:
    """Who has which rows of the flat stream: training windows, then pieces of prompts, then decodes."""

    forwards: list[tuple[JobWindow, slice]]
    prompts: list[tuple[Chunk, slice]]
    decodes: list[tuple[Chunk, slice]]

    @property
    def chunks(self) -> list[tuple[Chunk, slice]]:
        return self.prompts + self.decodes

    @property
    def are_decodes(self) -> bool:
        return not (self.forwards or self.prompts)


def lay_out(batch: Batch, forwards: list[JobWindow]) -> Rows:
    """With `forwards` in place of the batch's own. Decodes are sorted by adapter, so that those who share one are one
    run of rows."""
    decodes = sorted(batch.decodes, key=lambda sequence: sequence.adapter or "")
    offset = 0

    def span(num_tokens: int) -> slice:
        nonlocal offset
        offset += num_tokens
        return slice(offset - num_tokens, offset)

    return Rows(
        [(work, span(work.window.num_tokens)) for work in forwards],
        [(chunk, span(chunk.num_tokens)) for chunk in batch.prompts],
        [(Chunk(sequence, sequence.num_computed_tokens, 1), span(1)) for sequence in decodes],
    )
