"""What was asked of a training, in words, and two versions of an adapter side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.adapter_store.admin.formats import compact, decimal, percent, scientific, size, whole
from shared.messages import TrainSpec
from shared.models import AdapterVersion
from shared.peft import LINEAR_TARGETS, BottleneckSpec, Ia3Spec, LoraSpec, PeftSpec, PrefixSpec, PromptSpec


@dataclass(frozen=True, slots=True)
class Line:
    """`better` is -1 where the left value is better, 1 where the right one is, else 0."""

    label: str
    left: str
    right: str
    better: int = 0

    @property
    def differs(self) -> bool:
        return self.left != self.right


@dataclass(frozen=True, slots=True)
class Comparison:
    left: AdapterVersion
    right: AdapterVersion
    metrics: list[Line]
    parameters: list[Line]  # those that differ


def describe_spec(spec: dict[str, Any]) -> dict[str, str]:
    """A TrainSpec, label by label. A field that an older version did not know has its default."""
    train = TrainSpec.model_validate(spec)
    words = describe_method(train.peft) | {
        "Epochs": str(train.n_epochs),
        "Batch size": str(train.batch_size),
        "Accumulation": f"{train.gradient_accumulation_steps} steps",
        "Learning rate": scientific(train.learning_rate),
        "Schedule": f"{train.lr_schedule}, {train.warmup_ratio:.0%} warm-up",
        "Optimizer": f"AdamW ({train.beta1:g}, {train.beta2:g})",
        "Weight decay": f"{train.weight_decay:g}",
        "Gradient clip": f"{train.max_grad_norm:g}" if train.max_grad_norm else "off",
        "Max. length": f"{train.max_seq_len:,} tokens",
        "Seed": str(train.seed),
    }
    if train.max_steps:
        words["Max. steps"] = f"{train.max_steps:,}"
    return words


def describe_method(peft: PeftSpec) -> dict[str, str]:
    match peft:
        case LoraSpec():
            return describe_lora(peft)
        case Ia3Spec():
            return {
                "Method": "(IA)³",
                "Targets": name_targets(peft.target_modules),
                "Scaled at the input": ", ".join(peft.feedforward_modules) or "none",
            }
        case BottleneckSpec():
            return {
                "Method": "Parallel bottleneck adapter" if peft.parallel else "Bottleneck adapter",
                "Size": str(peft.size),
                "Activation": peft.activation,
                "Scaling": f"{peft.scaling:g}",
                "Targets": name_targets(peft.target_modules),
            }
        case PrefixSpec():
            return {"Method": "Prefix tuning", "Virtual tokens": str(peft.num_virtual_tokens)}
        case PromptSpec():
            return {"Method": "Prompt tuning", "Virtual tokens": str(peft.num_virtual_tokens)}


def describe_lora(peft: LoraSpec) -> dict[str, str]:
    words = {
        "Method": "DoRA" if peft.use_dora else "LoRA",
        "Rank": str(peft.rank),
        "Alpha": f"{peft.alpha:g}" + (" / √rank" if peft.use_rslora else ""),
        "Targets": name_targets(peft.target_modules),
    }
    return words | ({"Dropout": f"{peft.dropout:g}"} if peft.dropout else {})


def name_targets(targets: Sequence[str]) -> str:
    if not set(LINEAR_TARGETS) <= set(targets):
        return ", ".join(targets)
    others = [target for target in targets if target not in LINEAR_TARGETS]
    return ", ".join(["all linear layers", *others])


def compare(left: AdapterVersion, right: AdapterVersion) -> Comparison:
    return Comparison(left, right, compare_metrics(left, right), compare_parameters(left, right))


def compare_metrics(left: AdapterVersion, right: AdapterVersion) -> list[Line]:
    lines = [
        measured("Validation loss", left, right, "valid_loss", lower_is_better=True),
        measured("Base model, same data", left, right, "base_valid_loss"),
        measured("Training loss", left, right, "train_loss", lower_is_better=True),
        measured("Validation accuracy", left, right, "valid_mean_token_accuracy", lower_is_better=False),
        measured("Training accuracy", left, right, "train_mean_token_accuracy", lower_is_better=False),
        Line("Tokens trained", compact(left.trained_tokens), compact(right.trained_tokens)),
        Line("Size", size(left.size_bytes), size(right.size_bytes)),
    ]
    return lines


def measured(
    label: str,
    left: AdapterVersion,
    right: AdapterVersion,
    name: str,
    *,
    lower_is_better: bool | None = None,
) -> Line:
    a, b = left.metrics.get(name), right.metrics.get(name)
    better = 0
    if lower_is_better is not None and a is not None and b is not None and a != b:
        better = -1 if (a < b) == lower_is_better else 1
    if name.endswith("accuracy"):
        return Line(label, percent(a, 1), percent(b, 1), better)
    return Line(label, decimal(a), decimal(b), better)


def compare_parameters(left: AdapterVersion, right: AdapterVersion) -> list[Line]:
    a, b = describe_spec(left.hyperparameters), describe_spec(right.hyperparameters)
    lines = [Line(label, a.get(label, "–"), b.get(label, "–")) for label in {**a, **b}]
    lines.append(Line("Dataset", (left.dataset_digest or "–")[:12], (right.dataset_digest or "–")[:12]))
    lines.append(Line("Base model", left.base_digest[:12], right.base_digest[:12]))
    return [line for line in lines if line.differs]


def describe_report(report: dict[str, Any]) -> dict[str, str]:
    """One file's counts, label by label."""
    return {
        "Examples": whole(report.get("examples")),
        "Tokens": whole(report.get("tokens")),
        "Trained on": whole(report.get("trained_tokens")),
        "Longest example": f"{whole(report.get('longest_example'))} tokens",
        "Lines with errors": whole(report.get("error_count")),
    }
