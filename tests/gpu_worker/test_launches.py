"""What a launch of an iteration must not do: wait for the device."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from services.gpu_worker.engine.batch import Batch
from services.gpu_worker.engine.in_flight import InFlight
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.kernels.sampling import sample_tokens
from tests.builders import make_tiny_model
from tests.gpu_worker.engines import METHODS, make_adapter, make_timeless_engine, prompt_of, run
from tests.gpu_worker.training import make_dataset

JOB = JobConfig(n_epochs=3, batch_size=2, learning_rate=0.01, max_steps=2)
WAITS = (  # for its values
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
)


class NoWaiting(TorchDispatchMode):
    """Operations whose results' shapes or Python values depend on what a tensor holds are refused."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert op not in WAITS, f"{op} waits for the device"
        if op is torch.ops.aten.index.Tensor:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), (
                "a mask's index waits for the device"
            )
        return op(*args, **(kwargs or {}))


def test_nothing_in_a_launch_waits_for_what_the_device_computes(tmp_path: Path) -> None:
    """But for updates, which on a CPU know their norm at once. Drawn as on a GPU, by the kernel's twin."""
    folder = make_tiny_model(tmp_path / "tiny", "qwen3", tied=False)
    engine = make_timeless_engine(folder, async_scheduling=True)
    engine.runner._sample_tokens = sample_tokens
    engine.load_adapter("a" * 64, make_adapter(engine.model.config, METHODS["prefix"]))
    vocab = engine.model.config.vocab_size
    for name in ("lora", "prompt", "dora"):
        engine.add_job(name, JOB, METHODS[name], make_dataset([20, 9, 31], vocab))
    how = [
        Sampling(max_tokens=6, repetition_penalty=2.0, logit_bias=((3, 1.0),), logprobs=2),
        Sampling(max_tokens=6, temperature=1.0, top_p=0.5, frequency_penalty=1.0, prompt_logprobs=1),
        Sampling(max_tokens=6),
    ]
    names = [f"r{i}" for i in range(len(how))]
    for i, (name, sampling) in enumerate(zip(names, how, strict=True)):
        adapter = "a" * 64 if i == 2 else None
        engine.add(name, prompt_of(engine, 9 + i, seed=i), sampling, adapter=adapter)
    launch, num_watched = engine.runner.launch, 0

    def watched(batch: Batch) -> InFlight:
        nonlocal num_watched
        num_watched += not batch.updates
        with nullcontext() if batch.updates else NoWaiting():
            return launch(batch)

    engine.runner.launch = watched  # type: ignore[method-assign]
    run(engine, *names)
    run(engine)
    assert num_watched > 2
