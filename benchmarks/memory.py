"""What finetuning needs beside the model, ours and transformers + peft: `python -m benchmarks.memory`.

Optimizer steps on one sequence, each variant in a process of its own: the bytes that wait between forward and
backward, the process's peak above what it held before the step (weights, adapter and optimizer states are there
by then), and the tokens per second of the whole step. The seconds are processor time on one thread, so that a
busy machine changes little. All variants train the same LoRA from the same model; their losses are kept too, to
compare.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.console import console
from benchmarks.options import SMOLLM2, Dtypes, Model
from benchmarks.report import save
from services.gpu_worker.baseline import AdapterDtype, LiveBytes, autograd_bytes, peft_config, saved_bytes
from services.gpu_worker.compiler.programs import CompiledMethod
from services.gpu_worker.finetune.dataset import Dataset, epoch_order
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.peft import LoraConfig
from services.gpu_worker.model.transformer import Transformer
from services.gpu_worker.model.weights import load_weights
from tests.gpu_worker.training import advance, make_dataset, make_trainer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHOD = LoraConfig(16, 32.0, TARGETS)
JOB = JobConfig(batch_size=1, learning_rate=1e-6)
NUM_STEPS = 3  # to warm up, for the peak, for the speed
WARM_UP_TOKENS = 32
WINDOW = 256  # tokens that we compute at a time, forward and backward
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
BASELINE = "transformers + peft"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "memory.png"


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    policy: int | None = None  # of ours, by its place in the method's list; None: transformers + peft
    adapter_dtype: AdapterDtype = "float32"
    checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One variant on one sequence."""

    variant: Variant
    folder: Path
    dtype: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Found:
    name: str
    saved_bytes_per_token: float  # all layers; with keys and values, without the vocabulary's side
    peak_bytes: int  # of the process, above what it held before the step
    tokens_per_cpu_s: float
    loss: float


def variants(folder: Path, dtype: str, num_tokens: int) -> list[Variant]:
    found = [Variant(BASELINE), Variant(f"{BASELINE}, gradient checkpointing", checkpointing=True)]
    if dtype != "float32":
        found.insert(1, Variant(f"{BASELINE}, {dtype} adapters", adapter_dtype="model"))
    config = ModelConfig.from_folder(folder)
    compiled = CompiledMethod(config, METHOD, dtype=DTYPES[dtype], sequence_length=num_tokens)
    for index, policy in enumerate(compiled.policies):
        found.append(Variant(f"FlexLLM, keeps {policy.name.replace('+', ' ')}", index))
    return found


def measure(task: Task) -> Found:
    """Runs in a process of its own."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    dataset = make_examples(task)
    if task.variant.policy is None:
        return measure_peft(task, dataset)
    return measure_ours(task, dataset)


def make_examples(task: Task) -> Dataset:
    """Three examples, all of whose tokens are learnt; the one that a job takes first is short."""
    lengths = [task.num_tokens] * NUM_STEPS
    lengths[epoch_order(NUM_STEPS, JOB.seed, 0)[0]] = WARM_UP_TOKENS
    return make_dataset(lengths, ModelConfig.from_folder(task.folder).vocab_size, masked=0.0)


def measure_ours(task: Task, dataset: Dataset) -> Found:
    assert task.variant.policy is not None
    weights = load_weights(task.folder, DTYPES[task.dtype], torch.device("cpu"))
    trainer = make_trainer(
        Transformer(weights, max_position=task.num_tokens),
        dataset,
        method=METHOD,
        config=JOB,
        policy=task.variant.policy,
        max_tokens_in_flight=task.num_tokens,
    )

    def step() -> float:
        advance(trainer, lambda: WINDOW)
        report = trainer.optimizer_step()
        trainer.job.complete_update(trainer.parameters.num_parts)
        assert report is not None and report.train_loss is not None
        return report.train_loss

    step()
    peak, elapsed, loss = observe(step)
    config = weights.config
    cache = 2 * config.num_layers * config.kv_size * weights.dtype.itemsize
    saved = cache + trainer.memory.activations / task.num_tokens
    return Found(task.variant.name, saved, peak, task.num_tokens / elapsed, loss)


def measure_peft(task: Task, dataset: Dataset) -> Found:
    """The customary loop: AdamW on the adapters, loss and labels shifted by the model itself."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(task.folder, dtype=DTYPES[task.dtype])
    model = get_peft_model(
        base, peft_config(METHOD), autocast_adapter_dtype=task.variant.adapter_dtype == "float32"
    )
    model.train()
    if task.variant.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=JOB.learning_rate, weight_decay=JOB.weight_decay)
    examples = [
        torch.from_numpy(dataset.example(index)[0]).long()[None]
        for index in epoch_order(NUM_STEPS, JOB.seed, 0)
    ]
    remaining = iter(examples)

    def step() -> float:
        tokens = next(remaining)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, JOB.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the states before the step and after it are alike
        return float(loss.detach())

    step()
    peak, elapsed, loss = observe(step)
    if task.variant.checkpointing:
        saved = checkpointed_bytes(model, examples[-1], task)
    else:
        saved = saved_bytes(model, examples[-1], use_cache=False)
    return Found(task.variant.name, saved / task.num_tokens, peak, task.num_tokens / elapsed, loss)


def checkpointed_bytes(model: Any, tokens: torch.Tensor, task: Task) -> int:
    """What is alive after the forward beside the logits, and one layer's share while it is computed again."""
    with LiveBytes() as live:
        logits = model(input_ids=tokens, use_cache=False).logits
        gc.collect()
        held = live.now - logits.untyped_storage().nbytes()
    plain = autograd_bytes(
        model.config.to_dict(),
        METHOD,
        num_tokens=task.num_tokens,
        adapter_dtype=task.variant.adapter_dtype,
        dtype=DTYPES[task.dtype],
    )
    kept: int = held + plain.per_layer
    return kept


def observe(step: Callable[[], float]) -> tuple[int, float, float]:
    """Peak of resident memory in a step above what was resident before it, and processor seconds and loss of
    another step. Linux with glibc.

    In the first the C library gives every freed tensor back at once: else its fragmented heap, which differs
    by a third from run to run, would be measured. That costs time, so the second runs as by default.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 64 << 10)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak afresh
    before = resident("VmRSS")
    step()
    peak = resident("VmHWM") - before
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # where glibc's own adaptation ends
    libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
    started = time.process_time()
    loss = step()
    return peak, time.process_time() - started, loss


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_all(tasks: list[Task]) -> Iterator[Found]:
    """Each in a fresh process, so that no peak hides in what another left behind; one on each core."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
        yield from pool.map(measure, tasks)


def show(results: dict[str, Any]) -> None:
    table = Table(title=f"Finetuning one sequence of {results['num_tokens']} tokens, beside {BASELINE}")
    for column in ("dtype", "variant", "saved bytes/token", "less", "peak MiB", "less", "tokens/CPU s"):
        table.add_column(column, justify="left" if column in ("dtype", "variant") else "right")
    for dtype, rows in results["dtypes"].items():
        for row in rows:
            saved, peak = row["saved_bytes_per_token"], row["peak_bytes"]
            less = [rows[0]["saved_bytes_per_token"] / saved, rows[0]["peak_bytes"] / peak]
            sizes = [f"{saved:,.0f}", f"{less[0]:.1f}x", f"{peak / 2**20:.0f}", f"{less[1]:.1f}x"]
            table.add_row(dtype, row["name"], *sizes, f"{row['tokens_per_cpu_s']:.0f}")
    console.print(table)


def save_picture(results: dict[str, Any], path: Path) -> None:
    """Bars of both figures for every variant, a row of panels for each dtype."""
    from matplotlib.figure import Figure

    dtypes = results["dtypes"]
    figure = Figure(figsize=(13, 3.6 * len(dtypes) + 0.6), layout="constrained")
    panels = figure.subplots(len(dtypes), 2, squeeze=False)
    for (dtype, rows), (left, right) in zip(dtypes.items(), panels, strict=True):
        names = [row["name"] for row in rows]
        colors = ["#8a8a8a" if name.startswith(BASELINE) else "#d9632a" for name in names]
        saved = [row["saved_bytes_per_token"] / 2**10 for row in rows]
        peaks = [row["peak_bytes"] / 2**20 for row in rows]
        rates = [row["tokens_per_cpu_s"] for row in rows]
        speeds = [f" {a:.0f} MiB, {b:.0f} tokens/s" for a, b in zip(peaks, rates, strict=True)]
        left.bar_label(left.barh(names, saved, color=colors), fmt=" %.0f", fontsize=8)
        right.bar_label(right.barh(names, peaks, color=colors), labels=speeds, fontsize=8)
        left.set_title(f"{dtype}: kept for the backward, KiB a token", fontsize=10)
        right.set_title(f"{dtype}: peak of the process above its state before; one thread", fontsize=10)
        right.set_yticks([])
        right.set_xlim(right=1.4 * max(peaks))
        for axes in (left, right):
            axes.invert_yaxis()
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{results['model']}, LoRA rank {METHOD.rank} on all linears, one sequence of {results['num_tokens']} "
        f"tokens; baseline: {BASELINE} with float32 adapters (its default)",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def main(
    model: Model = SMOLLM2,
    num_tokens: Annotated[int, typer.Option(help="Length of the sequence.")] = 512,
    dtype: Dtypes = None,
) -> None:
    results: dict[str, Any] = {
        "model": model.name,
        "num_tokens": num_tokens,
        "window": WINDOW,
        "threads": 1,
        "dtypes": {},
    }
    for name in dtype or list(DTYPES):
        console.print(f"measuring {name} ...")
        tasks = [Task(variant, model, name, num_tokens) for variant in variants(model, name, num_tokens)]
        results["dtypes"][name] = [asdict(found) for found in measure_all(tasks)]
    show(results)
    save_picture(results, PICTURE)
    console.print(f"saved to {save('memory', results)} and {PICTURE}")


if __name__ == "__main__":
    typer.run(main)
