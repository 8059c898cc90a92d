"""`flexllm plan`: what finetuning a model would keep, cost and save, without the model and without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from services.errors import OperatorError
from shared.model_folder import ModelFolderError, read_json
from shared.peft import PeftSpec
from shared.tokenizer import ChatTemplateError, ChatTokenizer

if TYPE_CHECKING:
    from services.gpu_worker.dry_run import Form
    from services.gpu_worker.plan import Plan, Request
    from services.gpu_worker.savings import Step

USUAL_TOKENS = 8192
SCORED_TOKENS = 8192  # of --texts
PeftType = Literal["lora", "ia3", "bottleneck", "prefix_tuning", "prompt_tuning"]
METHOD_OPTIONS = {  # parameters of `plan` -> fields of a method's message
    "rank": "rank",
    "alpha": "alpha",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "dropout": "dropout",
    "targets": "target_modules",
    "feedforward": "feedforward_modules",
    "size": "size",
    "activation": "activation",
    "scaling": "scaling",
    "parallel": "parallel",
    "virtual_tokens": "num_virtual_tokens",
}


def plan(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Preset, model folder or config.json.")],
    peft: Annotated[PeftType, typer.Option(help="Method.")] = "lora",
    rank: Annotated[int | None, typer.Option(help="Of LoRA.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of LoRA.")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="LoRA with alpha over the rank's root.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="LoRA with magnitudes.")] = False,
    dropout: Annotated[float | None, typer.Option(help="Of LoRA.")] = None,
    targets: Annotated[str | None, typer.Option(help="Linears, with commas between.")] = None,
    feedforward: Annotated[str | None, typer.Option(help="Targets whose input IA3 scales.")] = None,
    size: Annotated[int | None, typer.Option(help="Of bottleneck adapters.")] = None,
    activation: Annotated[str | None, typer.Option(help="Of bottleneck adapters.")] = None,
    scaling: Annotated[float | None, typer.Option(help="Of bottleneck adapters.")] = None,
    parallel: Annotated[bool, typer.Option("--parallel", help="Bottleneck adapters of inputs.")] = False,
    virtual_tokens: Annotated[int | None, typer.Option(help="Of prefix and prompt tuning.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Ranks that share the model.")] = 1,
    hardware: Annotated[Literal["h200", "a100", "cpu"], typer.Option(help="Prices of layouts.")] = "h200",
    kernels: Annotated[
        Literal["auto", "triton", "torch"],
        typer.Option(help="Whose memory is counted; auto: the hardware's."),
    ] = "auto",
    seq: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence.", show_default=str(USUAL_TOKENS))
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens at a time.", show_default="a worker's most")
    ] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the model.")] = "bfloat16",
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="GiB of a rank for activations.", show_default="at most 30 % more FLOPs"),
    ] = None,
    quantise: Annotated[Literal["none", "int8", "int4"], typer.Option(help="The layers' linears.")] = "none",
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Training file: measure the folder's perplexity on it in every form of the weights."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    code: Annotated[bool, typer.Option("--code", help="The generated backward programs alone.")] = False,
) -> None:
    """Show what finetuning a model keeps, computes again and saves; it needs neither the model nor a GPU.

    Only --texts computes with the model, in a folder.
    """
    with _clear_errors():
        from services.gpu_worker.planner import Planner

        request = parse_request(context.params)
        planner = Planner(request, measure_perplexity(request, texts) if texts else None)
        if code:
            for layers, source in planner.programs.items():
                typer.echo(f"# {layers}\n{source.strip()}\n")
        elif as_json:
            typer.echo(json.dumps(plan_json(planner.plan()), indent=2))
        else:
            show(planner.plan(), Console(highlight=False))


def show(found: Plan, terminal: Console) -> None:
    from services.plan_tables import WIDTH, plan_tables

    terminal.width = min(WIDTH, terminal.width) if terminal.is_terminal else WIDTH
    terminal.print(plan_tables(found))


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        from services.gpu_worker.model.config import UnsupportedModel
        from services.gpu_worker.model.peft import InvalidAdapter
    except ImportError as error:
        raise OperatorError(f"a plan needs the worker's packages, the extra `worker`: {error}") from error
    try:
        yield
    except (UnsupportedModel, InvalidAdapter) as error:
        raise OperatorError(str(error)) from error


def parse_request(options: dict[str, Any]) -> Request:
    """From the parameters of `plan`."""
    import torch

    from services.gpu_worker.methods import method_of
    from services.gpu_worker.model.config import ModelConfig
    from services.gpu_worker.plan import Request

    given = {name: options[name] for name in METHOD_OPTIONS if options[name] is not None}
    settings = {METHOD_OPTIONS[name]: value for name, value in given.items() if value is not False}
    spec = parse_method(options["peft"], settings)
    hf_config = read_config(options["model"])
    try:
        positions = ModelConfig.from_hf(hf_config).max_position
    except KeyError as error:
        raise OperatorError(f"the config.json of {options['model']} has no {error}") from error
    budget = options["budget"]
    given_window = {} if options["window"] is None else {"window_tokens": options["window"]}
    return Request(
        model=options["model"],
        hf_config=hf_config,
        method=method_of(spec),
        dtype={"bfloat16": torch.bfloat16, "float32": torch.float32}[options["dtype"]],
        sequence_tokens=options["seq"] or min(USUAL_TOKENS, positions),
        tensor_parallel=options["tp"],
        hardware=options["hardware"],
        quantise=options["quantise"],
        budget_bytes=None if budget is None else int(budget * 2**30),
        dropout=getattr(spec, "dropout", 0.0),
        kernels=options["kernels"],
        **given_window,
    )


def measure_perplexity(request: Request, texts: Path) -> dict[Form, float]:
    from services.gpu_worker.perplexity import MOST_SCORED, perplexities

    folder = Path(request.model)
    if not (folder / "config.json").is_file():
        raise OperatorError(f"--texts: {request.model} has no weights to measure; --model has to be a folder")
    tokens = read_texts(folder, texts, MOST_SCORED)
    with Console(stderr=True).status(f"Scoring {sum(map(len, tokens)):,} tokens in every form ..."):
        return perplexities(folder, str(request.dtype).removeprefix("torch."), tokens)


def read_texts(folder: Path, file: Path, most_tokens: int) -> list[list[int]]:
    """Tokens of a training file's chats, and of as many as SCORED_TOKENS allow."""
    try:
        tokenizer, lines = ChatTokenizer(folder), file.read_text().splitlines()
    except (OSError, UnicodeDecodeError, ModelFolderError) as error:
        raise OperatorError(f"--texts {file}: {error}") from error
    found: list[list[int]] = []
    for number, line in enumerate(lines, 1):
        try:
            tokens = tokenizer.encode_chat(json.loads(line)["messages"], None, add_generation_prompt=False)
        except (ValueError, TypeError, KeyError, ChatTemplateError) as error:
            raise OperatorError(f"--texts {file}, line {number}: no chat with messages: {error}") from error
        found.append(tokens[:most_tokens])
        if sum(map(len, found)) >= SCORED_TOKENS:
            break
    if not any(len(tokens) > 1 for tokens in found):
        raise OperatorError(f"--texts {file}: no text")
    return found


def parse_method(kind: str, settings: dict[str, Any]) -> PeftSpec:
    """Raises OperatorError for a value, or for an option of another method."""
    for field in ("target_modules", "feedforward_modules"):
        if field in settings:
            settings[field] = [name.strip() for name in settings[field].split(",")]
    adapter: TypeAdapter[PeftSpec] = TypeAdapter(PeftSpec)
    try:
        spec = adapter.validate_python({"type": kind, **settings})
    except ValidationError as error:
        problem = error.errors()[0]
        field = next((str(part) for part in problem["loc"] if part in METHOD_OPTIONS.values()), "")
        given = f"{_option(field)} {problem['input']}: " if field else ""
        raise OperatorError(given + problem["msg"].removeprefix("Value error, ")) from error
    foreign = sorted(set(settings) - set(type(spec).model_fields))
    if foreign:
        raise OperatorError(f"{_option(foreign[0])} is no option of {kind}")
    return spec


def _option(field: str) -> str:
    name = next(name for name, own in METHOD_OPTIONS.items() if own == field)
    return f"--{name.replace('_', '-')}"


def read_config(model: str) -> dict[str, Any]:
    """A preset's, a folder's or a file's; raises OperatorError with the presets for anything else."""
    from services.gpu_worker.compiler.presets import PRESETS, preset
    from services.gpu_worker.model.config import UnsupportedModel

    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return read_json(file)
    if path.exists():
        raise OperatorError(f"{model} has no config.json")
    try:
        return preset(model)
    except UnsupportedModel as error:
        presets = ", ".join(PRESETS)
        raise OperatorError(f"{model!r} is no model folder, no config.json and none of {presets}") from error


# --- for machines


def plan_json(found: Plan) -> dict[str, Any]:
    request = found.request
    content = asdict(found)
    own = content["request"]
    del own["hf_config"]
    own["dtype"] = str(request.dtype).removeprefix("torch.")
    own["method"]["type"] = type(request.method).__name__.removesuffix("Config").lower()
    content["flops"]["total_flops_per_token"] = found.flops.total
    content["memory"]["peak_bytes"] = found.memory.peak_bytes
    plain = [step for step in found.baselines if not step.extra_flops_percent]
    for name in ("baselines", "ablation"):
        content[name] = [_step_json(step, plain) for step in getattr(found, name)]
    return content


def _step_json(step: Step, plain: list[Step]) -> dict[str, Any]:
    against = {other.name: 100 * (1 - step.peak_bytes / other.peak_bytes) for other in plain}
    return {**asdict(step), "peak_bytes": step.peak_bytes, "saved_percent_of_peak": against}
