"""The same LoRA, from the same start, on the same examples in the same order: our engine alone beside the
customary loop of transformers + peft with padded batches. Losses are compared step by step."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from benchmarks.peers.serving import DTYPES, make_engine
from benchmarks.peers.turns import OURS, Run, best, compared
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.finetune.dataset import Dataset, epoch_order
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.model.parameters import Key
from services.gpu_worker.model.peft import LoraConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXAMPLES = 24
BATCH_SIZE = 8
RANK = 16
DATA = Path(__file__).parents[2] / "data" / "gsm8k" / "train.jsonl"


def load_examples(folder: Path) -> Dataset:
    """GSM8K chats; the answers are what is learnt."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
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
    training = Training(folder, dtype, engine, load_examples(folder))
    row = compared(best(rounds, {OURS: training.ours, "peft": training.theirs}))
    losses = training.losses
    difference = max(abs(a - b) for a, b in zip(losses["ours"], losses["peft"], strict=True))
    return {**row, "loss_difference": difference, "losses": losses}


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

    def ours(self) -> Run:
        """Forward, backward and optimizer of every example."""
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
        return Run(len(self.dataset.tokens), elapsed)

    def theirs(self) -> Run:
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
        return Run(len(self.dataset.tokens), time.perf_counter() - started)

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
