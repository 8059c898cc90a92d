"""A finetuning job as a plan of work: which window of which training sequence comes next. No tensors.

An optimizer step is a list of training sequences (examples packed end to end). Each goes forward, in windows through
all layers or, all that is left of it, layer by layer; then backward layer by layer, last window first; after the last
one the optimizer moves. Evaluations only go forward. The adapter is frozen from a step's first window to its last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto

from services.gpu_worker.finetune.dataset import epoch_order
from services.gpu_worker.finetune.packing import Examples, TrainingSequence, pack


@dataclass(frozen=True, slots=True)
class JobConfig:
    """Hyper-parameters that decide the order of work and the size of the updates."""

    n_epochs: int = 1
    batch_size: int = 8  # examples of one forward-backward
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_schedule: str = "cosine"  # cosine, linear, constant
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    lora_dropout: float = 0.0
    seed: int = 0
    eval_every_steps: int = 0  # 0: before the first step, after each epoch and at the end
    max_steps: int = 0  # 0: no limit beside the epochs


class Phase(Enum):
    FORWARD = auto()
    BACKWARD = auto()
    OPTIMIZER = auto()
    REPORT = auto()  # an evaluation is over
    DONE = auto()


@dataclass(slots=True)
class Window:
    """Tokens [start, end) of the training sequence in flight: forward through all layers (`layer` None), or through
    one of them in either direction.

    Behind the last layer a forward has one more, the loss. `base` is where the windows of a layer's forward begin.
    """

    start: int
    end: int
    layer: int | None = None
    phase: Phase = Phase.FORWARD
    base: int = 0

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(slots=True)
class FinetuneJob:
    """Progress of one job: ask for the next window, and `complete` it when it has been computed."""

    job_id: str
    config: JobConfig
    training: Examples
    validation: Examples | None
    num_layers: int
    max_tokens_in_flight: int
    grain: int = 1  # of which sequences are multiples, where they have room for filler
    weight: float = 1.0
    trains_layers: bool = True  # else the loss alone has gradients, and nothing goes backward
    trains_head: bool = False  # losses sum into the same gradients
    step: int = 0  # optimizer steps done
    phase: Phase = Phase.FORWARD
    position: int = 0  # forward: next token; backward: end of the next window
    base: int = 0  # forward: tokens that have gone through all layers
    layer: int = 0  # that comes next; in a forward `num_layers` for the loss
    num_update_parts: int = 1  # into which an optimizer step can be cut
    updated_parts: int = 0  # of the step in hand
    sequence_index: int = 0
    sequences: list[TrainingSequence] = field(default_factory=list)  # of the step or evaluation in hand
    evaluated_step: int = -1  # the last step after which the validation set was run
    blocks: list[int] = field(default_factory=list)  # of the key/value cache, for the sequence in flight
    can_park: bool = False  # host memory has room for its keys and values
    parked: bool = False  # they are there, and the job waits for blocks
    restarts: int = 0  # how often a step in hand was given up
    tenant: str = ""  # whose jobs share one turn; "": the job's own
    served_tokens: float = 0.0  # token-layers computed per weight, for the fair share among jobs

    def __post_init__(self) -> None:
        longest = max(self.training.lengths + (self.validation.lengths if self.validation else []))
        if longest > self.max_tokens_in_flight:
            raise ValueError(f"an example of {longest} tokens exceeds {self.max_tokens_in_flight} in flight")
        for examples in filter(None, (self.training, self.validation)):
            if 0 in examples.num_targets:
                index = examples.num_targets.index(0)
                raise ValueError(f"example {index} of {len(examples)} has no training target")
        self._plan()

    # --- the plan

    @property
    def examples_per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        return max(1, -(-len(self.training) // self.examples_per_step))

    @property
    def total_steps(self) -> int:
        steps = self.steps_per_epoch * self.config.n_epochs
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    @property
    def sequence(self) -> TrainingSequence:
        return self.sequences[self.sequence_index]

    @property
    def reads_cache(self) -> bool:
        """Whether the next window reads keys and values of windows before it."""
        return self.phase is Phase.BACKWARD or (self.phase is Phase.FORWARD and self.num_cached_tokens > 0)

    @property
    def num_cached_tokens(self) -> int:
        """Of the sequence in flight, with keys and values of some layer at least."""
        in_first_layer = self.phase is Phase.FORWARD and self.layer == 0
        return self.position if in_first_layer else self.sequence.num_tokens

    @property
    def can_pass_all_layers(self) -> bool:
        """Whether the next window may: none before it is on its way."""
        return self.phase is Phase.FORWARD and self.layer == 0 and self.position == self.base

    def step_examples(self, step: int) -> list[int]:
        """Indices of the examples of an optimizer step; a pure function of (seed, step)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(len(self.training), self.config.seed, epoch)
        return order[index * self.examples_per_step : (index + 1) * self.examples_per_step]

    @property
    def denominator(self) -> int:
        """Labelled tokens of the optimizer step in hand, which its gradient is divided by."""
        return sum(self.training.num_targets[i] for i in self.step_examples(self.step))

    def learning_rate(self) -> float:
        """Rate of the step in hand: linear warm-up, then the schedule (as transformers' schedulers do)."""
        return self.config.learning_rate * schedule_factor(
            self.config.lr_schedule, self.step, self.total_steps, self.config.warmup_ratio
        )

    def _plan(self) -> None:
        """Sets up the evaluation or the optimizer step that comes next."""
        self.sequence_index = 0
        self._begin_sequence()
        if self._evaluation_due():
            assert self.validation is not None
            indices = list(range(len(self.validation)))
            self.sequences = self._pack(indices, self.validation, evaluation=True)
        elif self.step >= self.total_steps:
            self.sequences, self.phase = [], Phase.DONE
        else:
            chosen = self.step_examples(self.step)
            self.sequences = self._pack(chosen, self.training)

    def _begin_sequence(self) -> None:
        self.phase, self.position, self.base, self.layer = Phase.FORWARD, 0, 0, 0

    def _pack(
        self, indices: list[int], examples: Examples, evaluation: bool = False
    ) -> list[TrainingSequence]:
        return pack(indices, examples.lengths, self.max_tokens_in_flight, self.grain, evaluation)

    def _evaluation_due(self) -> bool:
        if self.validation is None or self.evaluated_step == self.step:
            return False
        every = self.config.eval_every_steps or self.steps_per_epoch
        return self.step % every == 0 or self.step >= self.total_steps

    # --- windows

    def next_window(self, max_tokens: int) -> Window:
        """Through all layers."""
        assert self.can_pass_all_layers
        return Window(self.position, min(self.position + max_tokens, self.sequence.num_tokens))

    def next_step(self, max_tokens: int) -> Window:
        """Through one layer."""
        if self.phase is Phase.FORWARD:
            end = min(self.position + max_tokens, self.sequence.num_tokens)
            return Window(self.position, end, self.layer, self.phase, self.base)
        assert self.phase is Phase.BACKWARD
        return Window(max(0, self.position - max_tokens), self.position, self.layer, self.phase)

    def complete(self, window: Window) -> None:
        """Moves past a window that `next_window` or `next_step` gave."""
        self.served_tokens += self._served(self.sequence, window)
        if window.phase is Phase.BACKWARD:
            self._complete_backward(window)
        else:
            self._complete_forward(window)

    def take_back(self, sequence: TrainingSequence, window: Window) -> None:
        """Stands before a step again that has been completed but not computed; of several the last one first."""
        assert window.layer is not None
        self.served_tokens -= self._served(sequence, window)
        self.sequence_index = next(i for i, own in enumerate(self.sequences) if own is sequence)
        self.phase, self.layer, self.base = window.phase, window.layer, window.base
        self.position = window.start if window.phase is Phase.FORWARD else window.end

    def _served(self, sequence: TrainingSequence, window: Window) -> float:
        depth = self.num_layers if window.layer is None else int(window.layer < self.num_layers)
        return sequence.examples_in(window.start, window.end) * depth / self.weight

    def _complete_forward(self, window: Window) -> None:
        self.position = window.end
        if window.layer is None:
            self.base = window.end
        if self.position < self.sequence.num_tokens:
            return
        if window.layer is not None and window.layer < self.num_layers:
            self.layer, self.position = window.layer + 1, self.base
        elif self.sequence.evaluation or not self.trains_layers:
            self._next_sequence()
        else:
            self.phase, self.layer = Phase.BACKWARD, self.num_layers - 1

    def _complete_backward(self, window: Window) -> None:
        self.position = window.start
        if self.position > 0:
            return
        if self.layer > 0:
            self.layer, self.position = self.layer - 1, self.sequence.num_tokens
        else:
            self._next_sequence()

    def _next_sequence(self) -> None:
        evaluation = self.sequence.evaluation
        self.sequence_index += 1
        self._begin_sequence()
        if self.sequence_index == len(self.sequences):
            self.phase = Phase.REPORT if evaluation else Phase.OPTIMIZER

    def complete_report(self) -> None:
        """Somebody reads what the evaluation has found."""
        assert self.phase is Phase.REPORT
        self.evaluated_step = self.step
        self._plan()

    def complete_update(self, end: int) -> bool:
        """The optimizer has moved the parts before `end`; whether that was the step's end."""
        assert self.phase is Phase.OPTIMIZER
        self.updated_parts = end
        if end < self.num_update_parts:
            return False
        self.updated_parts, self.step = 0, self.step + 1
        self._plan()
        return True

    def resume(self, step: int, evaluated_step: int) -> None:
        """Continues after `step` optimizer steps of an earlier run."""
        self.step, self.evaluated_step = step, evaluated_step
        self._plan()

    def restart_step(self) -> None:
        """Gives up what the step in hand has computed; its gradients must be dropped with it."""
        self.restarts += 1
        self.parked = False
        self._plan()


def schedule_factor(schedule: str, step: int, total_steps: int, warmup_ratio: float) -> float:
    """Share of the learning rate at `step` (0-based)."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 1.0
