"""The training sequence in flight on the device: its tokens, its labels, and which keys its windows read."""

from __future__ import annotations

from threading import Lock

import numpy as np
import torch
from torch import Tensor

from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import Window
from services.gpu_worker.finetune.packing import TrainingSequence
from services.gpu_worker.finetune.window_attention import GatheredWindow, PagedRuns, WindowAttention
from services.gpu_worker.kernels.attention import causal_mask
from services.gpu_worker.kernels.backend import TORCH, Kernels
from services.gpu_worker.kernels.kv_cache import KVCache
from services.gpu_worker.kernels.paged_attention import PagedBatch, Run
from services.gpu_worker.kernels.transfer import to_device
from services.gpu_worker.model.attention import PagedWindow, WindowPart
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.transformer import VIRTUAL_TOKEN

TOKEN_BYTES = 3 * 8  # its id, its label and its position
MAX_CACHED_WINDOWS = 32


class SequenceTensors:
    """Of one training sequence whose examples stand behind `num_virtual_tokens` each. Labels are shifted; filler has
    none, and positions behind those of virtual tokens."""

    def __init__(
        self,
        sequence: TrainingSequence,
        dataset: Dataset,
        num_virtual_tokens: int,
        config: ModelConfig,
        cache: KVCache,
        kernels: Kernels = TORCH,
    ) -> None:
        examples = [_with_virtual(*dataset.example(i), num_virtual_tokens) for i in sequence.examples]
        self.sequence = sequence
        self._config, self._cache, self._kernels = config, cache, kernels
        filler = np.zeros(sequence.filler, np.int64)
        last = num_virtual_tokens + np.arange(sequence.filler)
        labels = np.concatenate([*(labels for _, labels in examples), filler - 100])
        positions = np.concatenate([*(np.arange(len(tokens)) for tokens, _ in examples), last])
        self.tokens = self._on_device(np.concatenate([*(t.astype(np.int64) for t, _ in examples), filler]))
        self.labels, self.positions = self._on_device(labels), self._on_device(positions)
        self._labelled = np.flatnonzero(labels != -100)
        self._virtual = np.flatnonzero(positions < num_virtual_tokens)
        self._windows: dict[tuple[int, int], WindowAttention] = {}
        self._lock = Lock()  # lanes ask for windows at once
        self._parked: Tensor | None = None  # keys and values, from KVCache.save

    def _on_device(self, values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values), self._cache.device)

    def labelled_rows(self, window: Window) -> Tensor:
        """Which of the window's rows have a label: int64 [n]. The host knows, so that nobody waits for the device."""
        return self._rows(self._labelled, window)

    def virtual_rows(self, window: Window) -> Tensor:
        """Which of the window's rows stand for virtual tokens: int64 [n]."""
        return self._rows(self._virtual, window)

    def _rows(self, places: np.ndarray, window: Window) -> Tensor:
        first, last = np.searchsorted(places, (window.start, window.end))
        return self._on_device(places[first:last] - window.start)

    @property
    def size_bytes(self) -> int:
        windows = sum(window.size_bytes for window in self._windows.values())
        return self.tokens.nbytes + self.labels.nbytes + self.positions.nbytes + windows

    def runs(self, window: Window) -> list[Run]:
        """The window's rows, each example's for itself; their keys count from the sequence's start."""
        return [
            Run(b - a, b, first_key=begin) for begin, a, b in self.sequence.parts(window.start, window.end)
        ]

    def attention(self, window: Window, blocks: list[int]) -> WindowAttention:
        """Which keys the window's rows (counted from 0) read; the same for every layer.

        Kept for the layers to come, which are cut alike where time is no issue. Masks are large: no more of
        them are kept than a sequence that is cut once has.
        """
        key = window.start, window.end
        with self._lock:
            if key not in self._windows:
                while self._windows and not self._has_room(window.num_tokens):
                    del self._windows[next(iter(self._windows))]
                self._windows[key] = self._make(window, blocks)
            return self._windows[key]

    def _has_room(self, num_rows: int) -> bool:
        held = sum(end - start for start, end in self._windows)
        return len(self._windows) < MAX_CACHED_WINDOWS and held + num_rows <= len(self.tokens)

    @property
    def host_bytes(self) -> int:
        return 0 if self._parked is None else self._parked.nbytes

    def park(self, blocks: list[int]) -> None:
        """Saves keys and values in host memory."""
        self._parked = self._cache.save(blocks)

    def bring_back(self, blocks: list[int]) -> None:
        """Puts them into the first of these blocks."""
        assert self._parked is not None
        num_blocks = self._parked.shape[2] // self._cache.num_kv_heads
        self._cache.restore(blocks[:num_blocks], self._parked)
        self._parked = None
        self._windows.clear()  # they name the old blocks

    def _make(self, window: Window, blocks: list[int]) -> WindowAttention:
        if not self._kernels.is_triton:
            return GatheredWindow(self._gathered(window, blocks))
        cache = self._cache
        batch = PagedBatch.make(
            self.runs(window), [blocks], cache.num_kv_heads, cache.block_size, cache.device
        )
        return PagedRuns(batch, self._kernels)

    def _gathered(self, window: Window, blocks: list[int]) -> PagedWindow:
        group = self._config.num_heads // self._config.num_kv_heads
        dtype, device = self._cache.keys.dtype, self._cache.device
        parts = [
            WindowPart(
                rows=slice(a - window.start, b - window.start),
                keys=slice(begin, b),
                mask=causal_mask(b - a, b - begin, group, dtype, device),
            )
            for begin, a, b in self.sequence.parts(window.start, window.end)
        ]
        num_pages = -(-window.end // self._cache.block_size)
        return PagedWindow(self._cache.pages([blocks[:num_pages]]), parts)


def window_bytes(config: ModelConfig, dtype: torch.dtype, num_tokens: int, longest_example: int) -> int:
    """The most that the tensors of a sequence come to, its block tables aside; without masks where the longest
    example is said to have no token."""
    group = config.num_heads // config.num_kv_heads
    return num_tokens * (TOKEN_BYTES + group * min(longest_example, num_tokens) * dtype.itemsize)


def _with_virtual(tokens: np.ndarray, labels: np.ndarray, extra: int) -> tuple[np.ndarray, np.ndarray]:
    """An example behind `extra` virtual tokens, none of which predicts anything."""
    front = np.full(extra, VIRTUAL_TOKEN, tokens.dtype), np.full(extra, -100, labels.dtype)
    return np.concatenate([front[0], tokens]), np.concatenate([front[1], labels])
