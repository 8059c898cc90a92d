"""A backbone in int8 and int4 beside the dense one, all in our engine: `python -m benchmarks.quantised`.

Bytes; what rounding costs (perplexity on held-out GSM8K chats, agreement with the dense model's choices, the
loss of the same LoRA job step by step); what it gains or costs in speed, for single products and for the
engine. Rates are per second of processor time, on one thread, so that a busy machine changes little; each
is the best of a few rounds in which the forms take turns.

How far a checkpoint already lies on few levels is measured as well: a model that was once dequantised from
4 bits loses less to int4 in the same groups, and more in others, than one that was trained in 16.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.console import console
from benchmarks.forms import DENSE, FORMS, Form, levels, products, rounding
from benchmarks.options import SMOLLM2, Dtype, Model
from benchmarks.report import save
from services.gpu_worker.engine.config import EngineConfig
from services.gpu_worker.engine.engine import Engine
from services.gpu_worker.engine.scheduler_config import SchedulerConfig
from services.gpu_worker.engine.sequence import Logprob, Sampling
from services.gpu_worker.engine.slo import DEFAULT_TIER, SLO
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import JobConfig
from services.gpu_worker.kernels.linear import FrozenLinear
from services.gpu_worker.model.peft import GROUPS, LoraConfig
from services.gpu_worker.perplexity import perplexity, score

DATA = Path(__file__).parent.parent / "data" / "gsm8k"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHOD = LoraConfig(16, 32.0, TARGETS)
STEPS, BATCH_SIZE = 20, 4
PROMPTS, NEW_TOKENS = 16, 32


@dataclass(frozen=True, slots=True)
class Chat:
    tokens: list[int]
    prompt_length: int  # the question's part


def chats(folder: Path, file: str, count: int) -> list[Chat]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found = []
    for line in (DATA / file).read_text().splitlines()[:count]:
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        found.append(Chat(tokenizer.apply_chat_template(messages, return_dict=False), len(prompt)))
    return found


def make_engine(folder: Path, dtype: str, form: Form) -> Engine:
    """Without a latency target that a busy machine could miss: windows are as long as they may be."""
    limits = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=512, idle_ms=1e5)
    return Engine(
        EngineConfig(
            folder,
            "cpu",
            dtype,
            1,
            quantise=form.scheme,
            int4_group_size=form.group_size,
            kv_cache_bytes=256 << 20,
            slos={DEFAULT_TIER: SLO(tpot_ms=1e6, ttft_ms=1e6)},
            scheduler=limits,
        )
    )


def perplexity_of(held_out: list[Chat], scored: list[list[Logprob | None]]) -> dict[str, float]:
    answers = [row[chat.prompt_length :] for chat, row in zip(held_out, scored, strict=True)]
    return {"whole": perplexity(scored), "answers": perplexity(answers)}


def likeliest(scored: list[list[Logprob | None]]) -> list[int]:
    return [found.top[0][0] for row in scored for found in row if found]


def generate(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """Greedy continuations, and tokens per second of decodes alone: after every prompt's first token."""
    outputs: dict[str, list[int]] = {f"g{i}": [] for i in range(len(prompts))}
    for name, prompt in zip(outputs, prompts, strict=True):
        engine.add(name, prompt, Sampling(max_tokens=NEW_TOKENS), cache_salt=str(time.monotonic()))
    started, before = 0.0, 0
    while engine.has_work:
        for event in engine.step().tokens:
            if event.token is not None:
                outputs[event.request_id].append(event.token)
        if not started and all(outputs.values()):
            started, before = time.process_time(), sum(map(len, outputs.values()))
    elapsed = time.process_time() - started
    return list(outputs.values()), (sum(map(len, outputs.values())) - before) / elapsed


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """Share of greedy tokens before the first that differs, and of continuations that never differ."""
    same = [
        [a == b for a, b in zip(mine, other, strict=True)] for mine, other in zip(ours, theirs, strict=True)
    ]
    return {
        "tokens_before_first_difference": sum([*row, False].index(False) for row in same)
        / sum(map(len, same)),
        "identical": sum(map(all, same)) / len(same),
    }


def train(engine: Engine, training: list[Chat]) -> tuple[list[float], float]:
    """The same job from the same start: loss of each step, and tokens per second."""
    masks = [np.arange(len(chat.tokens)) >= chat.prompt_length for chat in training]
    tokens = np.concatenate([np.array(chat.tokens, np.int32) for chat in training])
    offsets = np.cumsum([0] + [len(chat.tokens) for chat in training]).astype(np.int64)
    config = JobConfig(n_epochs=1, batch_size=BATCH_SIZE, learning_rate=5e-4, warmup_ratio=0.0)
    engine.add_job("job", config, METHOD, Dataset(tokens, np.concatenate(masks).astype(np.uint8), offsets))
    losses: list[float] = []
    started = time.process_time()
    while engine.has_work:
        for event in engine.step().jobs:
            if event.error is not None:
                raise event.error
            if event.report is not None and event.report.train_loss is not None:
                losses.append(event.report.train_loss)
    elapsed = time.process_time() - started
    engine.remove_job("job")
    return losses, len(tokens) / elapsed


def linears(engine: Engine) -> list[FrozenLinear]:
    return [layer.linear(group) for layer in engine.model.weights.layers for group in GROUPS]


def measure(folder: Path, dtype: str, rounds: int) -> dict[str, Any]:
    engines = {form: make_engine(folder, dtype, form) for form in FORMS}
    dense = linears(engines[DENSE])
    held_out, training = (
        chats(folder, "validation.jsonl", 40),
        chats(folder, "train.jsonl", STEPS * BATCH_SIZE),
    )
    prompts = [chat.tokens[: chat.prompt_length] for chat in held_out[:PROMPTS]]
    scored: dict[Form, list[list[Logprob | None]]] = {}
    greedy: dict[Form, list[list[int]]] = {}
    forms: dict[str, Any] = {}
    for form, engine in engines.items():
        console.print(f"measuring {form.name} ...")
        scored[form], greedy[form] = (
            score(engine, [chat.tokens for chat in held_out]),
            generate(engine, prompts)[0],
        )
        same = [a == b for a, b in zip(likeliest(scored[form]), likeliest(scored[DENSE]), strict=True)]
        forms[form.name] = {
            "weights_bytes": engine.model.weights.size_bytes,
            "layers_bytes": sum(linear.size_bytes for linear in linears(engine)),
            "relative_rounding": rounding(form, dense, linears(engine)),
            "perplexity": perplexity_of(held_out, scored[form]),
            "same_likeliest_token": sum(same) / len(same),
            "greedy": agreement(greedy[form], greedy[DENSE]),
            "losses": train(engine, training)[0],
        }
    for _ in range(rounds):
        for form, engine in engines.items():
            found = {f"decode_{batch}": generate(engine, prompts[:batch])[1] for batch in (1, 8)}
            found["finetuning"] = train(engine, training[: 2 * BATCH_SIZE])[1]
            rates = forms[form.name].setdefault("tokens_per_s", found)
            rates.update({key: max(rate, rates[key]) for key, rate in found.items()})
    return {"distinct_of_32": levels(dense), "forms": forms, "products": products(dense, rounds)}


def show(results: dict[str, Any]) -> None:
    table = Table(title="The frozen backbone, one thread, tokens per second of processor time")
    columns = ("form", "MB", "ppl", "answers", "same", "decode", "x 8", "train", "loss")
    for column in columns:
        table.add_column(column, justify="left" if column == "form" else "right")
    for name, found in results["forms"].items():
        table.add_row(
            name,
            f"{found['weights_bytes'] / 1e6:.0f}",
            f"{found['perplexity']['whole']:.2f}",
            f"{found['perplexity']['answers']:.3f}",
            f"{found['same_likeliest_token']:.1%}",
            *(f"{rate:.0f}" for rate in found["tokens_per_s"].values()),
            f"{found['losses'][-1]:.3f}",
        )
    console.print(table)


def main(
    model: Model = SMOLLM2,
    dtype: Dtype = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the best counts.")] = 3,
) -> None:
    results = {"model": model.name, "dtype": dtype, "threads": 1, **measure(model, dtype, rounds)}
    show(results)
    console.print(f"saved to {save('quantised', results)}")


if __name__ == "__main__":
    typer.run(main)
