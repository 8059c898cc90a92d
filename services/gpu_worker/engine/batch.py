"""What one co-serving iteration computes, and what came out of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.gpu_worker.engine.interference import Interference
from services.gpu_worker.engine.latency import StepKind, Work
from services.gpu_worker.engine.sequence import Logprob, Sequence
from services.gpu_worker.finetune.job import FinetuneJob, Phase, Window
from services.gpu_worker.finetune.packing import TrainingSequence


@dataclass(slots=True)
class Chunk:
    """The next `num_tokens` uncomputed tokens of a sequence: one for a decode, else a piece of a prompt."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's end, so that its next token can be drawn."""
        return self.start + self.num_tokens == self.sequence.num_tokens

    @property
    def ends_pending(self) -> bool:
        """Whether its last token has been drawn but not read."""
        return self.samples and self.sequence.num_pending_tokens > 0

    @property
    def work(self) -> Work:
        return chunk_work(self.start, self.num_tokens)


@dataclass(slots=True)
class JobWindow:
    """A window of a job's training sequence; through one layer it is a step, which either lane may compute."""

    job: FinetuneJob
    sequence: TrainingSequence
    window: Window
    lane: int = 0
    expected_ms: float = 0.0  # of a step

    @property
    def work(self) -> Work:
        return window_work(self.sequence, self.window.start, self.window.end, self.kind)

    @property
    def kind(self) -> StepKind | None:
        window, last = self.window, self.job.num_layers - 1
        if window.layer is None:
            return None
        if window.phase is Phase.BACKWARD:
            return StepKind.FIRST_BACKWARD if window.layer == last else StepKind.BACKWARD
        return StepKind.LOSS if window.layer > last else StepKind.FORWARD

    @property
    def begins_sequence(self) -> bool:
        return self.window.phase is Phase.FORWARD and self.window.start == 0 and not self.window.layer

    @property
    def num_tokens(self) -> int:
        """Of examples."""
        return self.sequence.examples_in(self.window.start, self.window.end)

    def must_follow(self, earlier: JobWindow) -> bool:
        """Of two steps of a batch: whether this one has to wait for the earlier one to end.

        In the backward a step reads gradients of its rows from the layer above, of its keys and values from later
        windows of its layer, and sums into the keys and values before it. So neighbouring layers can be under way at
        once as long as the upper one's rows lie before the lower one's. In the forward it reads its rows of the layer
        below and the keys and values of earlier windows: the same holds. A loss concerns its own rows alone.
        """
        job, own, other = self.job, self.window, earlier.window
        if job is not earlier.job:
            return False
        assert own.layer is not None and other.layer is not None
        if other.layer == job.num_layers:
            is_summed = job.trains_head and own.layer == other.layer
            return is_summed or (other.start < own.end and own.start < other.end)
        if own.phase is not other.phase:
            return True
        if own.phase is Phase.BACKWARD:
            return other.layer != own.layer + 1 or other.end > own.start
        return other.layer != own.layer - 1 or other.start < own.end


@dataclass(frozen=True, slots=True)
class Update:
    """The parts [start, end) of a job's optimizer step."""

    job: FinetuneJob
    start: int
    end: int

    @property
    def share(self) -> float:
        return (self.end - self.start) / self.job.num_update_parts


@dataclass(frozen=True, slots=True)
class Parked:
    """A job that gave up its blocks; the first of them hold its keys and values."""

    job: FinetuneJob
    blocks: list[int]


def chunk_work(start: int, num_tokens: int) -> Work:
    if num_tokens == 1:
        return Work(decodes=1, keys=start + 1)
    return Work(window_tokens=num_tokens, pairs=num_tokens * start)


def decode_work(sequences: list[Sequence]) -> Work:
    keys = [sequence.num_computed_tokens + 1 for sequence in sequences]
    return Work(decodes=len(keys), keys=sum(keys), longest=max(keys, default=0))


def window_work(sequence: TrainingSequence, start: int, end: int, kind: StepKind | None = None) -> Work:
    """Of a window through all layers, or of a step."""
    num_tokens = end - start
    pairs = sequence.num_pairs(start, end)
    return Work(window_tokens=num_tokens, pairs=pairs, loss_tokens=num_tokens, kind=kind)


@dataclass(slots=True)
class Batch:
    """One fused forward over `prompts`, `decodes` and `forwards`, then `steps` in order, then `updates`.

    In two lanes the forward is in lane 0 and steps in either, each of which waits for those that it must follow;
    updates wait for both lanes. Steps that would not end in time are given back, but for the first.

    Where there is `interference` the forward is of decodes alone, and the steps begin beside it.

    Before all that the keys and values of `parked` jobs go to host memory, then those of jobs `brought_back`
    into their new blocks.
    """

    decodes: list[Sequence] = field(default_factory=list)  # with one uncomputed token each
    prompts: list[Chunk] = field(default_factory=list)
    forwards: list[JobWindow] = field(default_factory=list)  # through all layers
    steps: list[JobWindow] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    reports: list[FinetuneJob] = field(default_factory=list)  # whose evaluations end
    parked: list[Parked] = field(default_factory=list)
    brought_back: list[FinetuneJob] = field(default_factory=list)
    limit_ms: float = 0.0
    steps_until_ms: float = math.inf  # after the start; later steps are not begun
    lanes_ms: list[float] = field(default_factory=lambda: [0.0])  # when each lane will be done, as predicted
    updates_ms: float = 0.0  # what the updates will take after that
    interference: Interference | None = None
    _decode_work: Work | None = None

    @property
    def chunks(self) -> list[Chunk]:
        return self.prompts + [Chunk(s, s.num_computed_tokens, 1) for s in self.decodes]

    @property
    def num_prompt_tokens(self) -> int:
        return sum([chunk.num_tokens for chunk in self.prompts])

    @property
    def num_inference_tokens(self) -> int:
        return len(self.decodes) + self.num_prompt_tokens

    def num_tokens(self, phase: Phase) -> float:
        """Of training sequences, forward or backward; what goes through some layers counts in part."""
        whole = sum(work.num_tokens for work in self.forwards) if phase is Phase.FORWARD else 0
        steps = (step for step in self.steps if step.window.phase is phase and step.kind is not StepKind.LOSS)
        return whole + sum(step.num_tokens / step.job.num_layers for step in steps)

    @property
    def inference_work(self) -> Work:
        if self._decode_work is None:
            self._decode_work = decode_work(self.decodes)
        return sum((chunk.work for chunk in self.prompts), self._decode_work)

    @property
    def num_lanes(self) -> int:
        return len(self.lanes_ms)

    @property
    def predicted_ms(self) -> float:
        return max(self.lanes_ms) + self.updates_ms

    @property
    def forward_work(self) -> Work:
        return sum((forward.work for forward in self.forwards), self.inference_work)

    def steps_of(self, lane: int = 0) -> Iterator[tuple[int, JobWindow, int]]:
        """A lane's steps in order, with their places in `steps`; of each how many of the other lane's have to be done
        before."""
        counts, others = [0] * self.num_lanes, list[tuple[JobWindow, int]]()
        for index, step in enumerate(self.steps):
            counts[step.lane] += 1
            if step.lane != lane:
                others.append((step, counts[step.lane]))
            else:
                yield index, step, next((n for other, n in reversed(others) if step.must_follow(other)), 0)

    @property
    def has_finetuning(self) -> bool:
        return bool(self.forwards or self.steps or self.updates)

    @property
    def is_empty(self) -> bool:
        computed = self.decodes or self.prompts or self.has_finetuning
        return not (computed or self.parked or self.brought_back)

    def drop(self, sequence: Sequence) -> None:
        """Takes out what a preempted sequence would have computed."""
        if sequence in self.decodes:
            self.decodes.remove(sequence)
            self._decode_work = None
        self.prompts = [chunk for chunk in self.prompts if chunk.sequence is not sequence]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token drawn for a sequence."""

    sequence: Sequence
    token: int
    logprob: Logprob | None = None


@dataclass(slots=True)  # not frozen, which takes longer to make: there is one for every token
class Progress:
    """What an iteration meant for one sequence."""

    sequence: Sequence
    sampled: Sampled | None
    finish: str | None  # stop, length


@dataclass(frozen=True, slots=True)
class LaneTiming:
    """Milliseconds that a lane has computed, without what it waited for the other."""

    forward_ms: float
    steps_ms: float


@dataclass(slots=True)
class Timing:
    """Milliseconds of one iteration's parts: the fused forward, then the rest of the steps, then updates."""

    forward_ms: float = 0.0
    steps_ms: float = 0.0
    optimizer_ms: float = 0.0
    lanes: tuple[LaneTiming, ...] = ()

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.steps_ms + self.optimizer_ms
