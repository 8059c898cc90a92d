"""Our engine beside transformers and peft on one model, in one run: `python -m benchmarks.peers`.

Serving: greedy decoding of equally long prompts, our engine against `transformers` `generate`, at several
batch sizes. Finetuning: the same LoRA, the same start, the same examples in the same order, our engine alone
against a transformers + peft loop with padded batches; losses are compared step by step. The two sides take
turns, and each figure is the better of a few rounds, so that a disturbance hits neither alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from benchmarks.report import save
from services.gpu_worker.engine.engine import Engine, EngineConfig
from services.gpu_worker.engine.scheduler import SchedulerConfig
from services.gpu_worker.engine.sequence import Sampling
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO
from services.gpu_worker.finetune.dataset import Dataset, epoch_order
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.adapters import Key
from services.gpu_worker.model.peft import LoraConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT_TOKENS = 64
NEW_TOKENS = 48
EXAMPLES = 48
BATCH_SIZE = 8
RANK = 16
DATA = Path(__file__).parent.parent / "data" / "gsm8k" / "train.jsonl"
console = Console()


def best(rounds: int, *sides: Callable[[], float]) -> list[float]:
    """The highest rate of each side over interleaved rounds."""
    rates = [[side() for side in sides] for _ in range(rounds)]
    return [max(column) for column in zip(*rates, strict=True)]


def make_engine(folder: Path, dtype: str, threads: int) -> Engine:
    scheduler = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=1024, idle_ms=1000.0)
    slos = {DEFAULT_TIER: SLO(tpot_ms=1e6, ttft_ms=1e6)}
    return Engine(EngineConfig(folder, "cpu", dtype, threads, slos=slos, scheduler=scheduler))


def serving(
    folder: Path, dtype: str, threads: int, batches: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    engine = make_engine(folder, dtype, threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    rng = np.random.default_rng(0)
    rows = []
    for batch in batches:
        prompts = rng.integers(100, 40000, (batch, PROMPT_TOKENS))
        ours, theirs = best(
            rounds,
            lambda p=prompts: generate_ours(engine, p.tolist()),  # type: ignore[misc]
            lambda p=prompts: generate_theirs(model, torch.from_numpy(p)),  # type: ignore[misc]
        )
        rows.append({"batch": batch, "ours": ours, "transformers": theirs, "ratio": ours / theirs})
    return rows


def generate_ours(engine: Engine, prompts: list[list[int]]) -> float:
    """Generated tokens per second, prompts included in the time."""
    started = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add(f"r{i}", prompt, Sampling(max_tokens=NEW_TOKENS), cache_salt=str(started))
    while engine.has_work:
        engine.step()
    return len(prompts) * NEW_TOKENS / (time.perf_counter() - started)


def generate_theirs(model: Any, prompts: torch.Tensor) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
    return prompts.shape[0] * NEW_TOKENS / (time.perf_counter() - started)


def load_examples(folder: Path) -> Dataset:
    """GSM8K chats; the answers are what is learnt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens: list[int] = []
    mask: list[int] = []
    offsets = [0]
    for line in DATA.read_text().splitlines()[:EXAMPLES]:
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        tokens += whole
        mask += [0] * len(prompt) + [1] * (len(whole) - len(prompt))
        offsets.append(len(tokens))
    return Dataset(np.array(tokens, np.int32), np.array(mask, np.uint8), np.array(offsets, np.int64))


def finetuning(folder: Path, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    engine = make_engine(folder, dtype, threads)
    dataset = load_examples(folder)
    run = Training(folder, dtype, engine, dataset)
    ours, theirs = best(rounds, run.ours, run.theirs)
    difference = max(abs(a - b) for a, b in zip(run.losses["ours"], run.losses["peft"], strict=True))
    rates = {"ours": ours, "peft": theirs, "ratio": ours / theirs}
    return {**rates, "loss_difference": difference, "losses": run.losses}


CONFIG = JobConfig(n_epochs=1, batch_size=BATCH_SIZE, learning_rate=1e-3, warmup_ratio=0.0)


@dataclass
class Training:
    """The same job on both sides; peft starts from the weights that our side drew."""

    folder: Path
    dtype: str
    engine: Engine
    dataset: Dataset
    start: dict[Key, torch.Tensor] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def ours(self) -> float:
        """Tokens per second, forward, backward and optimizer done."""
        self.engine.add_job("job", CONFIG, LoraConfig(RANK, 2 * RANK, TARGETS), self.dataset)
        masters = self.engine.runner.trainers["job"].parameters.masters
        self.start = {key: master.clone() for key, master in masters.items()}
        losses = self.losses["ours"] = []
        started = time.perf_counter()
        while self.engine.has_work:
            for event in self.engine.step().jobs:
                if event.error is not None:
                    raise event.error
                if event.report is not None and event.report.train_loss is not None:
                    losses.append(event.report.train_loss)
        elapsed = time.perf_counter() - started
        self.engine.remove_job("job")
        return len(self.dataset.tokens) / elapsed

    def theirs(self) -> float:
        """The customary loop: padded batches, float32 adapters, AdamW, cosine schedule, clipping."""
        peft = self.make_peft()
        parameters = [p for p in peft.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=CONFIG.learning_rate, weight_decay=0.0)
        steps = -(-len(self.dataset) // BATCH_SIZE)
        schedule = get_cosine_schedule_with_warmup(optimizer, 0, steps)
        order = epoch_order(len(self.dataset), CONFIG.seed, 0)
        losses = self.losses["peft"] = []
        peft.train()
        started = time.perf_counter()
        for step in range(steps):
            examples = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            tokens, labels, attention = padded(self.dataset, examples)
            logits = peft(input_ids=tokens, attention_mask=attention).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return len(self.dataset.tokens) / (time.perf_counter() - started)

    def make_peft(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=DTYPES[self.dtype])
        peft = get_peft_model(model, PeftConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS)))
        with torch.no_grad():
            for name, module in peft.named_modules():
                if hasattr(module, "lora_A") and "default" in module.lora_A:
                    parts = name.split(".")
                    layer = int(parts[parts.index("layers") + 1])
                    module.lora_A["default"].weight.copy_(self.start[layer, f"{parts[-1]}.a"])
                    module.lora_B["default"].weight.copy_(self.start[layer, f"{parts[-1]}.b"])
        return peft


def padded(dataset: Dataset, examples: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = [dataset.example(i) for i in examples]
    width = max(len(tokens) for tokens, _ in pairs)
    tokens = torch.zeros(len(pairs), width, dtype=torch.int64)
    labels = torch.full((len(pairs), width), -100)
    attention = torch.zeros(len(pairs), width, dtype=torch.int64)
    for row, (ids, targets) in enumerate(pairs):
        tokens[row, : len(ids)] = torch.from_numpy(ids)
        labels[row, : len(ids)] = torch.from_numpy(targets)
        attention[row, : len(ids)] = 1
    return tokens, labels, attention


def show(results: dict[str, Any]) -> None:
    table = Table(title="FlexLLM beside transformers and peft (tokens per second)")
    for column in ("dtype", "task", "FlexLLM", "peer", "ratio", "largest loss difference"):
        table.add_column(column, justify="left" if column in ("dtype", "task") else "right")
    for dtype, found in results["dtypes"].items():
        for row in found["serving"]:
            cells = (f"{row['ours']:.0f}", f"{row['transformers']:.0f}", f"{row['ratio']:.2f}x", "")
            table.add_row(dtype, f"generate, batch {row['batch']}", *cells)
        row = found["finetuning"]
        difference = f"{row['loss_difference']:.1e}"
        cells = (f"{row['ours']:.0f}", f"{row['peft']:.0f}", f"{row['ratio']:.2f}x", difference)
        table.add_row(dtype, f"LoRA rank {RANK}, batch {BATCH_SIZE}", *cells)
    console.print(table)


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = Path(
        ".flexllm/models/SmolLM2-135M-Instruct"
    ),
    threads: Annotated[int, typer.Option(help="CPU threads of both sides.")] = 2,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the best counts.")] = 3,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
) -> None:
    torch.set_num_threads(threads)
    results: dict[str, Any] = {"model": model.name, "threads": threads, "rounds": rounds, "dtypes": {}}
    for name in dtype or list(DTYPES):
        console.print(f"measuring {name} ...")
        results["dtypes"][name] = {
            "serving": serving(model, name, threads, (1, 8, 16), rounds),
            "finetuning": finetuning(model, name, threads, max(1, rounds - 1)),
        }
    show(results)
    console.print(f"saved to {save('peers', results)}")


if __name__ == "__main__":
    typer.run(main)
