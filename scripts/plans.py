"""Writes docs/plans.md: what `flexllm plan` says of well-known models. A test compares one with the command."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from rich.console import Console

from services.gpu_worker.compiler.presets import preset
from services.gpu_worker.model.peft import BottleneckConfig, Ia3Config, LoraConfig, Method
from services.gpu_worker.plan import Plan, Request
from services.gpu_worker.planner import Planner
from services.gpu_worker.savings import Step
from services.plan_command import show
from services.plan_tables import saved

DOCUMENT = Path(__file__).parent.parent / "docs/plans.md"
MODELS = {
    "Llama-3.1-8B": 1,
    "Llama-3.1-70B": 4,
    "Qwen2.5-14B": 1,
    "Qwen2.5-32B": 2,
}  # and ranks that share them
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS: dict[str, Method] = {
    "LoRA": LoraConfig(16, 32.0, TARGETS),
    "IA3": Ia3Config(),
    "bottleneck": BottleneckConfig(64),
}
HEAD = """# Plans
What `flexllm plan` says of four models, and what each of its steps saves. Written by `make docs-plans`; nothing
here is measured on a GPU or copied from anywhere: tensors and FLOPs are read off the compiled graphs, sizes come
from the engine's own code, and the baseline's from transformers and peft themselves, both run on tensors that
hold nothing (`services/gpu_worker/dry_run.py`, `services/gpu_worker/baseline.py`). Ours are with Triton's kernels,
as a GPU runs them: attention masks nothing and gathers no keys (`services/gpu_worker/kernels/allocations.py`).

All are in bfloat16 for one sequence of 8,192 tokens; LoRA is of rank 16 on every linear, IA3 on k, v and down,
serial bottleneck adapters of size 64 on o and down. Weights, adapters and optimizer are the same for everybody
and not in the savings. The baselines:
- **a** transformers + peft with adapters in bfloat16: the leanest that autograd can do.
- **b** the same with adapters in float32, which is peft's default on a bfloat16 model: it copies every input of
  an adapter to float32.
- Of bottleneck adapters peft has none: modules like ours in transformers stand in for it.

Both use sdpa attention, which keeps no probabilities, and the loss of transformers, whose logits, float32 copies
and gradients are what comes on top of the activations at the peak. A cell says the GiB at the peak, in brackets
what of it waits for the backward (ours with keys and values), what is saved of the peaks of a and b, and the
FLOPs that are computed again. The steps are those of the paper, each on top of those before it; products are
computed again where that costs at most 30 % more FLOPs. The leanest policy keeps the layers' inputs alone.
"""


def section(name: str) -> str:
    plans = {method: make_plan(name, method) for method in METHODS}
    table = "\n".join(ablation_rows(plans))
    return f"\n## {name}\n{table}\n\n```\n{text(plans['LoRA'])}\n```\n"


def make_plan(name: str, method: str) -> Plan:
    return Planner(Request(name, preset(name), METHODS[method], tensor_parallel=MODELS[name])).plan()


def ablation_rows(plans: dict[str, Plan]) -> Iterator[str]:
    yield f"| GiB of one sequence | {' | '.join(plans)} |"
    yield "|---" * (1 + len(plans)) + "|"
    first = next(iter(plans.values()))
    baselines = zip_longest("ab", first.baselines, fillvalue="")
    names = [f"{mark and f'**{mark}** '}{step.name}" for mark, step in baselines if step]
    names += [step.name for step in first.ablation]
    columns = [[*plan.baselines, *plan.ablation] for plan in plans.values()]
    for name, *steps in zip(names, *columns, strict=True):
        cells = [cell(step, plan.baselines[:2]) for step, plan in zip(steps, plans.values(), strict=True)]
        yield f"| {name} | {' | '.join(cells)} |"


def cell(step: Step, plain: list[Step]) -> str:
    sizes = f"{step.peak_bytes / 2**30:.2f} ({step.kept_bytes / 2**30:.2f})"
    if step in plain:
        return sizes
    against = " / ".join(saved(step.peak_bytes, other.peak_bytes) for other in plain)
    price = f", +{step.extra_flops_percent:.0f} % FLOPs" if step.extra_flops_percent > 1 else ""
    return f"{sizes}, {against}{price}"


def text(plan: Plan) -> str:
    console = Console(file=io.StringIO(), highlight=False)
    show(plan, console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip()


def main() -> None:
    DOCUMENT.write_text(HEAD + "".join(map(section, MODELS)))


if __name__ == "__main__":
    main()
