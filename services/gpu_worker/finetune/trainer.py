"""The tensors of one finetuning job: computes the windows that the job's plan hands out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.gpu_worker.finetune.activations import ActivationStore
from services.gpu_worker.finetune.backward import BackwardContext, GradientState
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import Examples, FinetuneJob, TrainingSequence, Window
from services.gpu_worker.finetune.loss import LossSum, window_loss
from services.gpu_worker.finetune.optimizer import TrainableParameters
from services.gpu_worker.finetune.policies import LayerPolicies
from services.gpu_worker.kernels.attention import causal_mask
from services.gpu_worker.kernels.cross_entropy import LowRankHead
from services.gpu_worker.kernels.dropout import Dropout
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model.context import AdapterRun, Capture, PagedWindow, VirtualRows, WindowPart
from services.gpu_worker.model.peft import EMBEDDING, HEAD, LoraConfig, Method, num_virtual_tokens
from services.gpu_worker.model.transformer import VIRTUAL_TOKEN, Transformer

MAX_SKIPPED_STEPS = 3  # non-finite gradients in a row before a job is given up
MAX_CACHED_WINDOWS = 32  # of one sequence: layers are cut alike where time is no issue, and masks are large


class TrainingDiverged(RuntimeError):
    """Several optimizer steps in a row had gradients that were not finite."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step, or an evaluation after it."""

    step: int
    learning_rate: float | None = None
    grad_norm: float | None = None  # None: not finite, the step was skipped
    train_loss: float | None = None
    train_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    num_tokens: int = 0


def examples_of(dataset: Dataset, method: Method) -> Examples:
    """Lengths as the method makes them: virtual tokens stand in front of every example."""
    extra = num_virtual_tokens(method)
    return Examples([length + extra for length in dataset.lengths()], dataset.num_targets())


class Trainer:
    """Owns a job's parameters and the activations of its training sequence in flight."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        job: FinetuneJob,
        training: Dataset,
        validation: Dataset | None,
        policies: LayerPolicies,
    ) -> None:
        self.job = job
        self.policies = policies
        compiled = policies.compiled
        self.parameters = TrainableParameters(
            model.weights, compiled.method, job.config, compiled.partial_gradients
        )
        self.trained_tokens = 0
        self.skipped_steps = 0  # in a row
        self._model, self._cache = model, cache
        self._training, self._validation = training, validation
        self._restarts = 0  # of the job, when its gradients were last dropped
        self._store: ActivationStore | None = None
        self._gradients: GradientState | None = None
        self._total = LossSum.zero(model.weights.device)
        self._sequence: TrainingSequence | None = None
        self._dropout: Dropout | None = None
        self._tokens = self._labels = self._positions = torch.empty(0, dtype=torch.int64)
        self._windows: dict[tuple[int, int], PagedWindow] = {}

    @property
    def method(self) -> Method:
        return self.policies.compiled.method

    @property
    def device(self) -> torch.device:
        return self._model.weights.device

    @property
    def activation_bytes(self) -> int:
        return self._store.size_bytes if self._store else 0

    @property
    def store(self) -> ActivationStore:
        assert self._store is not None
        return self._store

    # --- one training sequence

    def begin(self, sequence: TrainingSequence) -> None:
        """Takes a sequence in hand; its keys and values live in the job's blocks until the next `begin`."""
        if self.job.restarts != self._restarts:
            self._drop_step()
        dataset = self._validation if sequence.evaluation else self._training
        assert dataset is not None
        extra = num_virtual_tokens(self.method)
        examples = [_with_virtual(*dataset.example(i), extra) for i in sequence.examples]
        self._sequence = sequence
        self._tokens = self._to_device(np.concatenate([tokens for tokens, _ in examples]).astype(np.int64))
        self._labels = self._to_device(np.concatenate([labels for _, labels in examples]))
        self._positions = self._to_device(np.concatenate([np.arange(len(tokens)) for tokens, _ in examples]))
        self._windows.clear()
        self._dropout = self._make_dropout(sequence)
        if not sequence.evaluation:
            self._reserve(sequence.num_tokens)

    def _make_dropout(self, sequence: TrainingSequence) -> Dropout | None:
        config = self.job.config
        if sequence.evaluation or not config.lora_dropout:
            return None
        return Dropout(config.lora_dropout, f"{config.seed}|{self.job.step}|{sequence.examples[0]}")

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _reserve(self, num_tokens: int) -> None:
        """Buffers for a sequence's activations and gradients; they only grow."""
        config, weights = self._model.config, self._model.weights
        if self._store is None or self._store.capacity < num_tokens:
            self._store = None  # before the larger one is made: both at once may not fit
            wide, reserve = accumulation_dtype(weights.dtype), self.policies.reserve
            self._store = ActivationStore(reserve, num_tokens, weights.dtype, wide, self.device)
            self._dx = torch.empty(num_tokens, config.hidden_size, dtype=weights.dtype, device=self.device)
        shape = (config.num_kv_heads, num_tokens, config.head_dim)
        wide = accumulation_dtype(weights.dtype)
        self._gradients = GradientState(
            self._dx[:num_tokens],
            torch.zeros(shape, dtype=wide, device=self.device),
            torch.zeros(shape, dtype=wide, device=self.device),
        )

    def tokens(self, window: Window) -> Tensor:
        return self._tokens[window.start : window.end]

    def positions(self, window: Window) -> Tensor:
        return self._positions[window.start : window.end]

    def adapter_run(self, window: Window, first_row: int) -> AdapterRun:
        """The job's adapter for the window's rows, which start at `first_row` of the stream."""
        assert self._sequence is not None
        rows = slice(first_row, first_row + window.num_tokens)
        return AdapterRun(
            rows.start,
            rows.stop,
            self.parameters.weights,
            self._dropout,
            window.start,
            self._virtual_rows(window, first_row),
            None if self._sequence.evaluation else Capture(rows, self.store, window.start),
        )

    def _virtual_rows(self, window: Window, first_row: int) -> VirtualRows | None:
        extra = num_virtual_tokens(self.method)
        if not extra:
            return None
        positions = self.positions(window)
        rows = (positions < extra).nonzero()[:, 0]
        return VirtualRows(rows + first_row, positions[rows])

    def paged(self, window: Window) -> PagedWindow:
        """Which keys the window's rows (counted from 0) read; the same for every layer."""
        key = window.start, window.end
        if key not in self._windows:
            if len(self._windows) == MAX_CACHED_WINDOWS:
                del self._windows[next(iter(self._windows))]
            self._windows[key] = self._make_paged(window)
        return self._windows[key]

    def _make_paged(self, window: Window) -> PagedWindow:
        assert self._sequence is not None
        config = self._model.config
        group = config.num_heads // config.num_kv_heads
        parts = [
            WindowPart(
                rows=slice(a - window.start, b - window.start),
                keys=slice(begin, b),
                mask=causal_mask(b - a, b - begin, group, self._model.weights.dtype, self.device),
            )
            for begin, a, b in self._sequence.parts(window.start, window.end)
        ]
        num_pages = -(-window.end // self._cache.block_size)
        return PagedWindow(self._cache.pages([self.job.blocks[:num_pages]]), parts)

    # --- windows

    def finish_forward(self, window: Window, hidden: Tensor) -> None:
        """Loss of a window that the fused forward has computed; `hidden` [n, D] are its rows."""
        assert self._sequence is not None
        evaluation = self._sequence.evaluation
        d_hidden = None
        if not evaluation:
            assert self._gradients is not None
            d_hidden = self._gradients.dx[window.start : window.end]
        labels = self._labels[window.start : window.end]
        denominator = 1.0 if evaluation else float(self.job.denominator)
        window_loss(self._model, hidden, labels, self._total, denominator, d_hidden, self._head())

    def _head(self) -> LowRankHead | None:
        pair = self.parameters.weights.low_rank(HEAD)
        if pair is None or not isinstance(self.method, LoraConfig):
            return None
        gradients = self.parameters.gradients
        return LowRankHead(
            *pair, self.method.scaling, gradients[None, f"{HEAD}.a"], gradients[None, f"{HEAD}.b"]
        )

    @torch.no_grad()
    def backward(self, window: Window) -> None:
        """Replaces the gradient of the window's rows by that of the layer's input; adds to the parameters'."""
        assert window.layer is not None and self._sequence is not None and self._gradients is not None
        if window.end == self._sequence.num_tokens:
            self._gradients.begin_layer()
        tokens = slice(window.start, window.end)
        paged, state = self.paged(window), self._gradients
        keys, values = self._cache.gather(window.layer, paged.pages, 1)
        context = BackwardContext(
            window.layer,
            tokens,
            self._model.rotation(self.positions(window)),
            paged,
            self.adapter_run(window, 0),
            keys,
            values,
            state,
            self._model.weights.group,
        )
        dx = self.policies.program(window.layer)(
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
            self._accumulate_below(window, context)

    def _accumulate_below(self, window: Window, context: BackwardContext) -> None:
        """Gradients of what the first layer's input was made from: prompts and the embedding's low-rank part."""
        parameters, dx = self.parameters, context.state.dx[context.tokens]
        if (None, "prompt.rows") in parameters.gradients:
            context.accumulate_virtual(parameters.gradients[None, "prompt.rows"], dx)
        pair = parameters.weights.low_rank(EMBEDDING)
        if pair is not None and isinstance(self.method, LoraConfig):
            tokens, (a, b) = self.tokens(window), pair
            wide = parameters.grad.dtype
            grad_a, grad_b = (parameters.gradients[None, f"{EMBEDDING}.{role}"] for role in "ab")
            grad_a.index_add_(1, tokens, (dx @ b).T.to(wide))
            grad_b.add_((dx.T @ a[:, tokens].T).to(wide), alpha=self.method.scaling)

    # --- steps

    def optimizer_step(self) -> StepReport:
        """Moves the parameters; raises TrainingDiverged after several gradients that were not finite."""
        job = self.job
        rate = job.learning_rate()
        loss, accuracy = self._take_means()
        norm = self.parameters.step(rate)
        self.skipped_steps = 0 if norm is not None else self.skipped_steps + 1
        if self.skipped_steps >= MAX_SKIPPED_STEPS:
            raise TrainingDiverged(
                f"the gradient was not finite in {self.skipped_steps} steps in a row, up to step {job.step + 1}"
            )
        num_tokens = sum(sequence.num_tokens for sequence in job.sequences)
        self.trained_tokens += num_tokens
        return StepReport(job.step + 1, rate, norm, loss, accuracy, num_tokens=num_tokens)

    def evaluation_report(self) -> StepReport:
        """Means over the validation set, once its last window has been computed."""
        loss, accuracy = self._take_means()
        return StepReport(self.job.step, valid_loss=loss, valid_accuracy=accuracy)

    def _take_means(self) -> tuple[float, float]:
        means = self._total.means()
        self._total = LossSum.zero(self.device)
        return means

    def _drop_step(self) -> None:
        """Forgets a step that the scheduler gave up: its gradients and its sums."""
        self._restarts = self.job.restarts
        self.parameters.grad.zero_()
        self._total = LossSum.zero(self.device)


def _with_virtual(tokens: np.ndarray, labels: np.ndarray, extra: int) -> tuple[np.ndarray, np.ndarray]:
    """An example behind `extra` virtual tokens, none of which predicts anything."""
    front = np.full(extra, VIRTUAL_TOKEN, tokens.dtype), np.full(extra, -100, labels.dtype)
    return np.concatenate([front[0], tokens]), np.concatenate([front[1], labels])
