"""Finetuning alone beside the ceiling of products, and its losses beside autograd's."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace

import torch

from benchmarks.gpu.autograd import AutogradLoop
from benchmarks.gpu.bench import JOB, METHOD, Bench, Row
from benchmarks.gpu.models import random_weights
from benchmarks.gpu.scales import shape_of
from benchmarks.replay import Run
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.sharing import SharingName
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.savings import recomputed_flops

AIM = 0.6  # of the ceiling, recomputed FLOPs not counted
WARM_UP = 0.3  # of the time that is measured
EXAMPLES, BATCH = 40, 4  # of the comparison of losses
MOST_DIFFERENCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
}  # of any step's losses: rounding adds up over steps


def finetuning(bench: Bench) -> Generator[Row]:
    """Floor: four FLOPs a token for each parameter of the layers' linears and the head, attention not counted; what is
    computed again counts in the last column only."""
    for sharing in ("coserve", "finetune-only"):
        yield _ours(bench, sharing)
    for checkpointing in (True, False):
        row = _theirs(bench, checkpointing)
        if row is not None:
            yield row


def _ours(bench: Bench, sharing: SharingName) -> Row:
    with bench.engine(sharing=sharing) as engine:
        bench.add_job(engine)
        Run(engine).play([], WARM_UP * bench.scale.train_s)
        run = Run(engine)
        run.play([], bench.scale.train_s)
        again = recomputed_flops(engine.runner.trainers["job"].policies)
    bench.found["alone"] = max(bench.found.get("alone", 0.0), run.rate)
    return _row(bench, f"FlexLLM, {sharing}", run.rate, again)


def _theirs(bench: Bench, checkpointing: bool) -> Row | None:
    """None where it does not fit."""
    tokens = bench.scale.train_tokens
    example = bench.dataset(1, tokens).tokens[None]
    bench.clean()
    try:
        loop = AutogradLoop(bench.hf_config, bench.weights, JOB, checkpointing=checkpointing)
        loop.step(example)
        bench.synchronize()
        steps, started = 0, time.perf_counter()
        while (taken := time.perf_counter() - started) < bench.scale.train_s or not steps:
            loop.step(example)
            bench.synchronize()
            steps += 1
    except torch.cuda.OutOfMemoryError:
        print(f"  autograd, {'with' if checkpointing else 'without'} checkpointing: out of memory")
        return None
    name = f"{loop.name}{', checkpointing' if checkpointing else ''}"
    again = 2.0 * bench.weights.config.num_linear_params if checkpointing else 0.0
    return _row(bench, name, steps * tokens / taken, again)


def _row(bench: Bench, name: str, rate: float, again: float) -> Row:
    """`again`: FLOPs a token that are computed a second time."""
    needed = 4 * bench.num_params
    share = bench.ratio(rate * needed, "flops")
    is_ours = name.startswith("FlexLLM")
    return {
        "who": name,
        "tokens/s": rate,
        "TFLOP/s": rate * needed / 1e12,
        "of ceiling": share,
        "aim": AIM if is_ours else None,
        "reached": share >= AIM if is_ours and share is not None else None,
        "computed again": again / needed,
        "of ceiling with it": bench.ratio(rate * (needed + again), "flops"),
    }


# --- losses


def losses(bench: Bench) -> Generator[Row]:
    """Of a small model from the same start, on the same examples in the same order."""
    for dtype in dict.fromkeys((bench.weights.dtype, torch.float32)):
        yield _losses(bench, dtype)


def _losses(bench: Bench, dtype: torch.dtype) -> Row:
    scale, (hidden, intermediate, layers, vocabulary) = bench.scale, bench.scale.loss_shape
    config = shape_of(bench.hf_config, hidden, intermediate, layers, vocabulary)
    weights = random_weights(ModelConfig.from_hf(config), dtype, bench.device)
    small = Bench(config, weights, replace(scale, decode_batches=(8,)), bench.profiles, bench.kernels)
    epochs = -(-scale.loss_steps * BATCH // EXAMPLES)
    job = replace(JOB, learning_rate=1e-3, n_epochs=epochs, max_steps=scale.loss_steps, batch_size=BATCH)
    dataset = small.dataset(EXAMPLES, scale.loss_tokens)
    with small.engine(finetune_tokens_in_flight=BATCH * scale.loss_tokens) as engine:
        planned = engine.add_job("job", job, METHOD, dataset)
        order = [planned.step_examples(step) for step in range(job.max_steps)]
        masters = engine.runner.trainers["job"].parameters.masters
        loop = AutogradLoop(config, weights, job, start={key: own.clone() for key, own in masters.items()})
        ours = _train(engine)
    theirs = [loop.step(_batch(dataset, examples)) for examples in order]
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return {
        "beside": loop.name,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": len(ours),
        "first": ours[0],
        "last": ours[-1],
        "its last": theirs[-1],
        "largest difference": difference,
        "limit": MOST_DIFFERENCE[dtype],
        "ok": difference <= MOST_DIFFERENCE[dtype],
        "losses": {"ours": ours, "theirs": theirs},
    }


def _train(engine: Engine) -> list[float]:
    found: list[float] = []
    while engine.has_work:
        for event in engine.step().jobs:
            if event.error is not None:
                raise event.error
            if event.report is not None and event.report.train_loss is not None:
                found.append(event.report.train_loss)
    return found


def _batch(dataset: Dataset, examples: list[int]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(dataset.example(index)[0]) for index in examples])
