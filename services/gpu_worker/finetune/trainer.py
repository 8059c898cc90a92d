"""The tensors of one finetuning job: computes the windows that the job's plan hands out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from services.gpu_worker.finetune.activations import ActivationStore
from services.gpu_worker.finetune.backward import BackwardContext, GradientState
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.host_ring import CopyStream, copy_stream, ring_depth
from services.gpu_worker.finetune.job import FinetuneJob, Window
from services.gpu_worker.finetune.loss import LossSum, Means, window_loss
from services.gpu_worker.finetune.memory import JobMemory
from services.gpu_worker.finetune.optimizer import GradientNorm, TrainableParameters
from services.gpu_worker.finetune.outside_layers import accumulate_below, low_rank_head
from services.gpu_worker.finetune.packing import Examples, TrainingSequence
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.finetune.reports import LaunchedSteps, StepReport, read_evaluation
from services.gpu_worker.finetune.sequence_tensors import SequenceTensors
from services.gpu_worker.finetune.window_attention import WindowAttention
from services.gpu_worker.kernels.dropout import Dropout
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.kernels.paged_attention import Run
from services.gpu_worker.model.context import AdapterRun, Capture, ForwardContext, VirtualRows
from services.gpu_worker.model.peft import Method, num_virtual_tokens
from services.gpu_worker.model.transformer import Transformer


def examples_of(dataset: Dataset, method: Method) -> Examples:
    """Lengths as the method makes them: virtual tokens stand in front of every example."""
    extra = num_virtual_tokens(method)
    return Examples([length + extra for length in dataset.lengths()], dataset.num_targets())


class Trainer:
    """Owns a job's parameters and the activations of its training sequence in flight, of which those of the
    first `num_host_layers` lie in host memory."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        job: FinetuneJob,
        training: Dataset,
        validation: Dataset | None,
        policies: LayerPolicies,
        num_host_layers: int = 0,
        num_lanes: int = 1,
        copies: CopyStream | None = None,
    ) -> None:
        """Up to `num_lanes` threads may compute steps at once, as `engine/lanes.py` allows.

        `copies` take activations to host memory; None: as the device does that best.
        """
        self.job = job
        self.policies = policies
        compiled = policies.compiled
        self.parameters = TrainableParameters(model.weights, compiled.method, job.config, compiled.layout)
        self.trained_tokens = 0
        self.steps = LaunchedSteps()
        layers = range(model.config.num_layers) if compiled.trains_layers else ()
        self._programs = [policies.program(layer) for layer in layers]
        self._norm: GradientNorm | None = None  # of the update in hand
        self._model, self._cache = model, cache
        self._training, self._validation = training, validation
        self._restarts = 0  # of the job, when its gradients were last dropped
        self._num_host_layers, self._num_lanes = num_host_layers, num_lanes
        self._copies = copies or copy_stream(self.device)
        self._store: ActivationStore | None = None
        self._gradients: GradientState | None = None
        self._total = LossSum()
        self._num_begun = 0  # sequences
        self._tensors: SequenceTensors | None = None
        self._dropout: Dropout | None = None

    @property
    def method(self) -> Method:
        return self.policies.compiled.method

    @property
    def device(self) -> torch.device:
        return self._model.weights.device

    @property
    def store(self) -> ActivationStore:
        assert self._store is not None
        return self._store

    # --- memory

    @property
    def memory(self) -> JobMemory:
        """What the job holds now, from its tensors."""
        store, state, tensors = self._store, self._gradients, self._tensors
        return JobMemory(
            trainable=self.parameters.weights.size_bytes,
            gradients=self.parameters.grad.nbytes,
            optimizer=self.parameters.optimizer_bytes,
            activations=store.size_bytes if store else 0,
            accumulators=state.size_bytes if state else 0,
            windows=tensors.size_bytes if tensors else 0,
            host_activations=store.host_bytes if store else 0,
            host_cache=tensors.host_bytes if tensors else 0,
        )

    def park(self, blocks: list[int]) -> None:
        """Saves the sequence's keys and values, which blocks hold that are no longer the job's."""
        self._flight.park(blocks)

    def bring_back(self) -> None:
        """Puts them into the job's new blocks."""
        self._flight.bring_back(self.job.blocks)

    def move_to_host(self) -> None:
        """Moves all kept activations to host memory, for good."""
        self._num_host_layers = self._model.config.num_layers
        if self._store is not None:
            self._store.move_to_host()

    def release(self) -> None:
        """Gives up the buffers and all that they hold; the next `begin` makes new ones."""
        self._store, self._gradients, self._tensors = None, None, None

    # --- one training sequence

    @property
    def _flight(self) -> SequenceTensors:
        assert self._tensors is not None
        return self._tensors

    def begin(self, sequence: TrainingSequence) -> None:
        """Takes a sequence in hand; its keys and values live in the job's blocks until the next `begin`."""
        if self.job.restarts != self._restarts:
            self._drop_step()
        dataset = self._validation if sequence.evaluation else self._training
        assert dataset is not None
        self._num_begun += 1
        self._tensors = None  # before the next sequence's are made
        extra = num_virtual_tokens(self.method)
        self._tensors = SequenceTensors(
            sequence, dataset, extra, self._model.config, self._cache, self._model.weights.kernels
        )
        self._dropout = self._make_dropout(sequence)
        self._reserve_gradients(sequence.num_tokens)
        if not sequence.evaluation:
            self._reserve_store(sequence.num_tokens)
            self.store.begin(sequence.num_tokens)

    def _make_dropout(self, sequence: TrainingSequence) -> Dropout | None:
        config = self.job.config
        if sequence.evaluation or not config.lora_dropout:
            return None
        return Dropout(config.lora_dropout, f"{config.seed}|{self.job.step}|{sequence.examples[0]}")

    def _reserve_gradients(self, num_tokens: int) -> None:
        """A buffer for a sequence's gradients, and before them its residual stream; it only grows."""
        if self._gradients is not None and len(self._gradients.dx) >= num_tokens:
            return
        self._gradients = None  # before a larger one is made: both at once may not fit
        config, dtype = self._model.config, self._model.weights.dtype
        self._gradients = GradientState.zeros(config, num_tokens, dtype, self.device, self._num_lanes)

    def _reserve_store(self, num_tokens: int) -> None:
        """The same for its activations."""
        if self._store is not None and self._store.capacity >= num_tokens:
            return
        self._store = None
        dtype, reserve = self._model.weights.dtype, self.policies.reserve
        host = self._copies, self._num_host_layers, ring_depth(self._num_lanes)
        self._store = ActivationStore(
            reserve, num_tokens, dtype, accumulation_dtype(dtype), self.device, *host
        )

    def tokens(self, window: Window) -> Tensor:
        return self._flight.tokens[window.start : window.end]

    def positions(self, window: Window) -> Tensor:
        return self._flight.positions[window.start : window.end]

    def attention(self, window: Window) -> WindowAttention:
        """Which keys the window's rows (counted from 0) read; the same for every layer."""
        return self._flight.attention(window, self.job.blocks)

    def runs(self, window: Window) -> list[Run]:
        """The same as runs of rows over the job's blocks."""
        return self._flight.runs(window)

    def adapter_run(self, window: Window, first_row: int) -> AdapterRun:
        """The job's adapter for the window's rows, which start at `first_row` of the stream."""
        rows = slice(first_row, first_row + window.num_tokens)
        return AdapterRun(
            rows.start,
            rows.stop,
            self.parameters.weights,
            self._dropout,
            window.start,
            self._virtual_rows(window, first_row),
            None if self._flight.sequence.evaluation else Capture(rows, self.store, window.start),
        )

    def _virtual_rows(self, window: Window, first_row: int) -> VirtualRows | None:
        if not num_virtual_tokens(self.method):
            return None
        rows = self._flight.virtual_rows(window)
        return VirtualRows(rows + first_row, self.positions(window)[rows])

    # --- windows

    @torch.no_grad()
    def forward(self, window: Window, context: ForwardContext) -> None:
        """Takes the window's rows of the residual stream through one layer; `context` is of these rows alone."""
        assert window.layer is not None
        stream = self._stream(window)
        x = stream if window.layer else self._model.embed(self.tokens(window), context.adapters)
        rotation = self._model.rotation(context.positions)
        stream.copy_(self._model.layer(window.layer, x, rotation, self._cache, context))

    def _stream(self, window: Window) -> Tensor:
        """The window's rows [n, D] of the residual stream, or of its gradient."""
        assert self._gradients is not None
        return self._gradients.dx[window.start : window.end]

    def finish_forward(self, window: Window, hidden: Tensor | None = None) -> None:
        """Loss of a window that has gone through all layers; `hidden` [n, D] are its rows of a fused forward."""
        evaluation = self._flight.sequence.evaluation
        stream = self._stream(window)
        hidden, d_hidden = stream if hidden is None else hidden, None if evaluation else stream
        rows = self._flight.labelled_rows(window)
        labels = self._flight.labels[window.start : window.end][rows]
        denominator = 1.0 if evaluation else float(self.job.denominator)
        head = low_rank_head(self.parameters, self.method)
        found = window_loss(self._model, hidden, rows, labels, denominator, d_hidden, head)
        if found is not None:
            self._total.windows[self._num_begun, window.start] = found

    @torch.no_grad()
    def backward(self, window: Window) -> None:
        """Replaces the gradient of the window's rows by that of the layer's input; adds to the parameters'."""
        assert window.layer is not None and self._gradients is not None
        if window.end == self._flight.sequence.num_tokens:
            self._gradients.begin_layer(window.layer)
        tokens = slice(window.start, window.end)
        state = self._gradients
        context = BackwardContext(
            window.layer,
            tokens,
            self._model.rotation(self.positions(window)),
            self.attention(window).of_layer(self._cache, window.layer),
            self.adapter_run(window, 0),
            state,
            self._model.weights.group,
        )
        dx = self._programs[window.layer](
            state.dx[tokens],
            self._model.weights.layers[window.layer],
            context,
            self.parameters.weights.layers[window.layer],
            self.parameters.accumulators[window.layer],
            self.store.window(window.layer, tokens),
        )
        if dx is not None:
            state.dx[tokens] = dx
        if window.layer == 0:
            accumulate_below(self.parameters, self.method, self.tokens(window), context)

    # --- steps

    def optimizer_step(self) -> StepReport:
        """All parts of an update at once. Raises as what `launch_step` returns."""
        read_report = self.launch_step(0, self.parameters.num_parts)
        assert read_report is not None
        return read_report()

    def launch_step(self, start: int, end: int) -> Callable[[], StepReport] | None:
        """Moves the parts [start, end) of the parameters; the last part ends the step and gives what reads its report.

        That raises TrainingDiverged after several gradients that were not finite.
        """
        job, parameters = self.job, self.parameters
        rate = job.learning_rate()
        if start == 0:
            self._norm = parameters.begin_step(rate)
        parameters.move(start, end)
        if end < parameters.num_parts:
            return None
        parameters.end_step()
        num_tokens = sum(sequence.num_example_tokens for sequence in job.sequences)
        self.trained_tokens += num_tokens
        assert self._norm is not None, "a step begins with its first part"
        report = StepReport(job.step + 1, rate, num_tokens=num_tokens)
        return self.steps.add(report, self._norm, self._take_means())

    def end_evaluation(self) -> Callable[[], StepReport]:
        """What reads the means over the validation set, whose last window has been computed."""
        return partial(read_evaluation, self.job.step, self._take_means())

    def _take_means(self) -> Means:
        means, self._total = self._total.means(), LossSum()
        return means

    def _drop_step(self) -> None:
        """Forgets a step that the scheduler gave up: its gradients and its sums."""
        self._restarts = self.job.restarts
        self.parameters.grad.zero_()
        self._total = LossSum()
