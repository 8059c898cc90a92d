"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.gpu_worker.compiler.plan import TensorPlan, TensorState
from services.gpu_worker.model.peft import Ia3Config, LoraConfig, Method, PrefixConfig, PromptConfig
from services.gpu_worker.plan import MemoryPlan, Plan
from services.gpu_worker.planner import HARDWARE
from services.gpu_worker.savings import Step

WIDTH = 110
STYLES = {
    TensorState.KEPT: "bold green",
    TensorState.IN_CACHE: "cyan",
    TensorState.RECOMPUTED: "yellow",
    TensorState.PRUNED: "dim",
    TensorState.COMPRESSED: "magenta",
}


def plan_tables(plan: Plan) -> Group:
    parts: list[RenderableType] = [_headline(plan), _tensors(plan)]
    if plan.policies:
        parts.append(_policies(plan))
    parts += [_memory(plan), savings_table(plan)]
    if plan.baseline_problem:
        parts.append(Text(f"No baseline: {plan.baseline_problem}.", style="yellow"))
    if plan.rank is not None:
        parts.append(_parallel(plan))
    return Group(*(line for part in parts for line in (part, Text())))


def describe_method(method: Method) -> str:
    if isinstance(method, PrefixConfig):
        return f"prefix tuning, {method.num_virtual_tokens} virtual tokens"
    if isinstance(method, PromptConfig):
        return f"prompt tuning, {method.num_virtual_tokens} virtual tokens"
    targets = ", ".join(name.removesuffix("_proj") for name in method.targets)
    if isinstance(method, LoraConfig):
        kind = "DoRA" if method.dora else "rsLoRA" if method.rslora else "LoRA"
        return f"{kind} of rank {method.rank} on {targets}"
    if isinstance(method, Ia3Config):
        return f"IA3 on {targets}"
    kind = "parallel" if method.parallel else "serial"
    return f"{kind} bottleneck adapters of size {method.size} on {targets}"


def size(size_bytes: float) -> str:
    """In the unit that a person would choose."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:,.2f} {unit}"
    return f"{size_bytes:,.0f} B"


def saved(ours: float, theirs: float) -> str:
    return f"{100 * (1 - ours / theirs):.1f} %" if theirs else "-"


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    """The first column is text, of the others those that end in a blank."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        is_text = index == 0 or column.endswith(" ")
        table.add_column(
            column.strip(), justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text
        )
    return table


def _headline(plan: Plan) -> Text:
    request = plan.request
    dtype = str(request.dtype).removeprefix("torch.")
    lines = [
        f"{request.model}: {describe_method(request.method)}",
        f"{plan.num_layers} layers, {dtype}, one sequence of {request.sequence_tokens:,} tokens, "
        f"{_share(request.tensor_parallel)} {HARDWARE[request.hardware].name}",
    ]
    return Text("\n".join(lines), style="bold")


def _share(tp: int) -> str:
    return "on" if tp == 1 else f"shared by {tp} ranks on"


# --- what the compiler decided


def _tensors(plan: Plan) -> Table:
    counts = plan.operations
    table = _table(
        "Tensors of a layer",
        "tensor",
        "made by ",
        "bytes/token",
        "state ",
        " ",
        caption=f"{counts.before_pruning} backward operations before pruning, {counts.after_pruning} after, "
        f"{counts.after_pruning_in_first_layer} in the first layer",
    )
    for tensor in plan.tensors:
        state = Text(tensor.state.value, style=STYLES[tensor.state])
        row_style = "dim" if tensor.state is TensorState.PRUNED else ""
        table.add_row(
            tensor.name,
            tensor.made_by,
            f"{tensor.bytes_per_token:,.0f}",
            state,
            _note(tensor, plan.num_layers),
            style=row_style,
        )
    return table


def _note(tensor: TensorPlan, num_layers: int) -> str:
    if tensor.state is TensorState.KEPT and tensor.kept_in_layers < num_layers:
        return f"in {tensor.kept_in_layers} of {num_layers} layers"
    return f"instead: {tensor.in_its_place}" if tensor.in_its_place else ""


def _policies(plan: Plan) -> Table:
    is_shared = plan.rank is not None
    columns = ["kept, beside keys and values", "B/token/layer"]
    columns += ["of a rank"] if is_shared else []
    columns += ["sequence", "FLOPs", *(f"saved {mark}" for mark, _ in _plain(plan)), "layers"]
    budget = plan.request.budget_bytes
    caption = "FLOPs: computed again, of those of forward and backward" + _legend(plan)
    if budget is not None and not plan.fits_budget:
        caption += f"\nnot even the leanest fits {size(budget)}"
    table = _table("Policies", *columns, caption=caption)
    for policy in plan.policies:
        row = [policy.name.replace("+", " "), f"{policy.bytes_per_token_layer:,.0f}"]
        row += [f"{policy.rank_bytes_per_token_layer:,.0f}"] if is_shared else []
        row += [size(policy.sequence_bytes), f"+{policy.extra_flops_percent:.1f} %"]
        row += [saved(policy.sequence_bytes, step.kept_bytes) for _, step in _plain(plan)]
        row += [str(policy.num_layers) if policy.num_layers else ""]
        table.add_row(*row, style="bold green" if policy.num_layers else "")
    return table


def _plain(plan: Plan) -> list[tuple[str, Step]]:
    """Baselines that keep everything, and the letters that stand for them in column heads."""
    plain = [step for step in plan.baselines if not step.extra_flops_percent]
    return list(zip("ab", plain, strict=False))


def _legend(plan: Plan) -> str:
    return "".join(f"\n{mark}: beside {step.name}" for mark, step in _plain(plan))


# --- memory


def _memory(plan: Plan) -> Table:
    table = _table("Memory", "", "whole model", *(["one rank"] if plan.rank else []), " ")
    rank = plan.rank

    def add(name: str, whole: float, of_rank: float | None, note: str = "") -> None:
        row = [name, size(whole), *([size(of_rank or 0)] if rank else []), note]
        table.add_row(*row)

    of_rank = {name: value for name, _, value in _sequence_rows(rank.memory)} if rank else {}
    for name, note, value in _sequence_rows(plan.memory):
        add(name, value, of_rank.get(name), note)
    table.add_section()
    adapter, own = plan.adapter, rank.adapter if rank else None
    number = f"{adapter.num_parameters:,} parameters"
    add("adapter", adapter.weight_bytes, own.weight_bytes if own else None, number)
    add("its gradient, float32", adapter.gradient_bytes, own.gradient_bytes if own else None)
    note = "float32 masters and two moments"
    add("its optimizer", adapter.optimizer_bytes, own.optimizer_bytes if own else None, note)
    table.add_section()
    for form, whole in plan.weights.bytes_by_form.items():
        is_chosen = form == plan.request.quantise
        name = "weights" if form == "none" else f"weights, linears in {form}"
        row = [name, size(whole), *([size(rank.weight_bytes) if is_chosen else ""] if rank else [])]
        notes = ["chosen"] if is_chosen else []
        if form in plan.weights.perplexity_by_form:
            notes.append(f"perplexity {plan.weights.perplexity_by_form[form]:.3f}")
        table.add_row(*row, ", ".join(notes), style="" if is_chosen else "dim")
    if plan.weights.second_layout_bytes:
        of_rank_too = rank.second_layout_bytes if rank else None
        add("oneDNN's layout of them", plan.weights.second_layout_bytes, of_rank_too)
    return table


def _sequence_rows(memory: MemoryPlan) -> list[tuple[str, str, int]]:
    window, sequence = memory.window, memory.sequence
    return [
        ("activations", "kept from forward to backward", memory.activation_bytes),
        ("keys and values", f"{memory.kv_bytes_per_token:,} bytes a token, in the cache", memory.kv_bytes),
        ("gradient of the residual stream", "one for all layers", sequence.residual_gradient_bytes),
        ("gradients of keys and values", "float32, one layer's at a time", sequence.kv_gradient_bytes),
        ("causal masks", "of all windows; Triton's kernels need none", sequence.mask_bytes),
        ("forward window", "one layer", window.forward_bytes),
        ("backward window", "one layer", window.backward_bytes),
        ("loss of a window", "logits in pieces", window.loss_bytes),
        ("sequence at its peak", "with the largest of the three", memory.peak_bytes),
    ]


def savings_table(plan: Plan) -> Table:
    plain = _plain(plan)
    caption = "at work: what comes on top; saved: of the peak" + _legend(plan)
    columns = ["GiB of one sequence", "kept", "at work", "peak", "FLOPs", *(f"saved {m}" for m, _ in plain)]
    table = _table("What each step saves", *columns, caption=caption)
    for steps in (plan.baselines, plan.ablation):
        for step in steps:
            table.add_row(*step_cells(step, [other for _, other in plain]))
        table.add_section()
    return table


def step_cells(step: Step, plain: Iterable[Step]) -> list[str]:
    sizes = (step.kept_bytes, step.work_bytes, step.peak_bytes)
    extra = f"+{step.extra_flops_percent:.1f} %"
    against = [saved(step.peak_bytes, other.peak_bytes) for other in plain]
    return [step.name, *(f"{value / 2**30:,.2f}" for value in sizes), extra, *against]


# --- several ranks


def _parallel(plan: Plan) -> Table:
    table = _table(
        f"Bypasses beside {plan.request.tensor_parallel} ranks' backbone",
        "bypass",
        "layout ",
        "forward ",
        "backward ",
        "each step ",
        "µs",
        "of a rank",
        " ",
        caption="µs: of an iteration, from a roofline; of a rank: one layer's, with gradients and optimizer",
    )
    sites = dict.fromkeys(candidate.site for candidate in plan.parallel)
    for site in sites:
        for index, candidate in enumerate(c for c in plan.parallel if c.site == site):
            table.add_row(
                site if index == 0 else "",
                candidate.name,
                ", ".join(candidate.forward_collectives) or "-",
                ", ".join(candidate.backward_collectives) or "-",
                ", ".join(candidate.step_collectives) or "-",
                f"{candidate.cost_us_per_iteration:,.1f}",
                size(candidate.trainable_bytes_per_rank),
                "chosen" if candidate.is_chosen else "",
                style="bold green" if candidate.is_chosen else "",
            )
        table.add_section()
    return table
