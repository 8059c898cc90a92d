"""What all sections share: the model on its device, engines over it, and what earlier sections have found."""

from __future__ import annotations

import gc
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.models import RANK
from benchmarks.gpu.scales import TARGETS, Scale
from services.gpu_worker.engine.config import EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.memory import free_bytes
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sharing import SharingName
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.kernels.backend import KernelChoice
from services.gpu_worker.model.peft import LoraConfig
from services.gpu_worker.model.weights import ModelWeights

METHOD = LoraConfig(RANK, 2.0 * RANK, TARGETS)
JOB = JobConfig(n_epochs=100_000, batch_size=4, learning_rate=1e-4, lr_schedule="constant")
CACHE_SHARE = 0.6  # of free memory, for keys and values, at most
NO_SLO = SLO(tpot_ms=60_000.0, ttft_ms=600_000.0)
GIB = 1 << 30
Row = dict[str, Any]


@dataclass(slots=True)
class Bench:
    hf_config: dict[str, Any]
    weights: ModelWeights
    scale: Scale
    profiles: Path  # a folder that all engines share
    kernels: KernelChoice = "auto"
    found: dict[str, float] = field(
        default_factory=dict
    )  # by earlier sections: rates that others are compared with
    starts_s: list[float] = field(default_factory=list)  # of engines

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    # --- sizes

    @property
    def num_params(self) -> int:
        """Of what every trained token is multiplied by: the layers' linears and the head."""
        config = self.weights.config
        return config.num_linear_params + config.vocab_size * config.hidden_size

    @property
    def decoded_bytes(self) -> int:
        """Of weights that a decode reads: all but the embedding's rows."""
        tied = self.weights.config.tied_embeddings
        return self.weights.size_bytes - (0 if tied else self.weights.embedding.nbytes)

    @property
    def kv_bytes(self) -> int:
        """Of a token's keys and values."""
        config = self.weights.config
        return 2 * config.num_layers * config.kv_size * self.weights.dtype.itemsize

    def ratio(self, value: float, name: str) -> float | None:
        """Over what an earlier section has found; None where it has found nothing."""
        return value / self.found[name] if self.found.get(name) else None

    # --- engines

    @contextmanager
    def engine(
        self,
        *,
        slo: SLO = NO_SLO,
        sharing: SharingName = "coserve",
        period: int = 64,
        **options: Any,
    ) -> Generator[Engine]:
        """Nobody may hold an earlier one: the device has no room for two."""
        self.clean()
        started = time.perf_counter()
        engine = Engine(self._config(slo, sharing, period, options), weights=self.weights)
        self.starts_s.append(time.perf_counter() - started)
        yield engine

    def _config(self, slo: SLO, sharing: SharingName, period: int, options: dict[str, Any]) -> EngineConfig:
        scale = self.scale
        limits = SchedulerConfig(
            max_num_seqs=max(scale.decode_batches),
            max_num_batched_tokens=scale.batched_tokens,
            max_model_len=scale.context,
            finetune_window=scale.train_tokens,
            sharing=sharing,
            period=period,
        )
        own: dict[str, Any] = {
            "device": str(self.device),
            "kernels": self.kernels,
            "lanes": False,
            "slos": {DEFAULT_TIER: slo},
            "kv_cache_bytes": min(self._wanted_cache(), int(CACHE_SHARE * free_bytes(self.device))),
            "finetune_tokens_in_flight": scale.train_tokens,
            "max_finetune_jobs": 1,
            "profile_dir": self.profiles,
            "scheduler": limits,
        }
        return EngineConfig(Path("weights of the benchmark"), **(own | options))

    def _wanted_cache(self) -> int:
        """For the largest batch, which grows while its prompts are read, and a training sequence."""
        scale = self.scale
        batch = max(scale.decode_batches)
        tokens = batch * (scale.decode_context + scale.decode_steps + 64) + scale.memory_tokens
        grown = batch * batch * scale.decode_context // scale.batched_tokens
        return max(tokens + grown, 2 * scale.context) * self.kv_bytes

    def clean(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    # --- examples

    def dataset(self, num_examples: int, num_tokens: int, seed: int = 0) -> Dataset:
        """Random tokens, all of which are learnt."""
        size, random = num_examples * num_tokens, np.random.default_rng(seed)
        tokens = random.integers(3, self.weights.config.vocab_size, size, np.int32)
        offsets = np.arange(0, size + 1, num_tokens, dtype=np.int64)
        return Dataset(tokens, np.ones(size, np.uint8), offsets)

    def add_job(self, engine: Engine) -> None:
        engine.add_job("job", JOB, METHOD, self.dataset(64, self.scale.train_tokens))
