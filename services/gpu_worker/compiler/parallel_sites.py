"""Where a PEFT method's bypasses attach to the tensor-parallel backbone, and what they compute there. No tensors."""

from __future__ import annotations

from dataclasses import dataclass

from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.layouts import (
    ACROSS,
    BACKBONE,
    COLUMN,
    ELEMENTWISE,
    INSIDE,
    LINEAR,
    ROW,
    STREAM,
    WHOLE,
    Attachment,
    Rule,
)
from services.gpu_worker.model.peft import (
    EMBEDDING,
    GROUPS,
    HEAD,
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    Method,
    PrefixConfig,
    Projection,
    PromptConfig,
    check_method,
    projections,
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One parameter of a bypass and the product that reads it."""

    parameter: str
    rules: tuple[Rule, ...]
    in_features: int
    out_features: int
    num_parameters: int
    has_bias: bool = False
    is_product: bool = True  # else a vector over the features or rows that are picked: no time to speak of


@dataclass(frozen=True, slots=True)
class Site:
    """One bypass: `operations` in the order of the forward, from the tensor it reads to the one it adds to."""

    name: str  # unique in a plan
    targets: tuple[str, ...]
    attachment: Attachment
    operations: tuple[Operation, ...]
    has_activation: bool = False  # between the operations: no sum may stay open there
    needs_norms: bool = False  # DoRA: row lengths of W + BA, computed where W lies

    @property
    def widths(self) -> tuple[int, ...]:
        """Features of what the bypass reads, of the tensors inside and of what it adds."""
        return (self.operations[0].in_features, *(op.out_features for op in self.operations))


def bypass_sites(method: Method, config: ModelConfig) -> list[Site]:
    """The bypasses of one layer, and those outside the layers; raises InvalidAdapter for an unknown target.

    LoRA's are per fused linear: the engine stacks the A of its targets and keeps their B block-diagonal.
    """
    check_method(method, config)
    if isinstance(method, PrefixConfig):
        rows = 2 * method.num_virtual_tokens  # keys and values
        return [_vector("prefix", ("k_proj", "v_proj"), INSIDE, config.kv_size, rows)]
    if isinstance(method, PromptConfig):
        rows = method.num_virtual_tokens
        return [_vector("prompt", (EMBEDDING,), STREAM, config.hidden_size, rows)]
    if isinstance(method, LoraConfig):
        return _lora_sites(method, config)
    targets = [projection for name, projection in projections(config).items() if name in method.targets]
    if isinstance(method, Ia3Config):
        return [_ia3_site(method, target) for target in targets]
    return [_bottleneck_site(method, target) for target in targets]


def _lora_sites(method: LoraConfig, config: ModelConfig) -> list[Site]:
    sites = []
    for group in GROUPS:
        members = [p for p in projections(config).values() if p.group == group and p.name in method.targets]
        if not members:
            continue
        names = tuple(member.name for member in members)
        outputs = sum(member.out_features for member in members)
        inner = method.rank * len(members)
        pair = _lora_pair(members[0].in_features, inner, outputs, method.rank * outputs)
        sites.append(Site(group, names, BACKBONE[group], pair, needs_norms=method.dora))
        if method.dora:
            sites.append(_vector(f"{group}.magnitude", names, _output_of(members[0]), outputs))
    for name, inputs, outputs in (
        (EMBEDDING, config.vocab_size, config.hidden_size),
        (HEAD, config.hidden_size, config.vocab_size),
    ):
        if name in method.targets:
            sites.append(_outside_the_layers(name, inputs, method.rank, outputs))
    return sites


def _lora_pair(inputs: int, inner: int, outputs: int, num_b: int) -> tuple[Operation, ...]:
    return (
        Operation("A", LINEAR, inputs, inner, inputs * inner),
        Operation("B", LINEAR, inner, outputs, num_b),
    )


def _outside_the_layers(name: str, inputs: int, rank: int, outputs: int) -> Site:
    """No program is compiled there that moves could be put into: every rank computes all."""
    pair = (
        Operation("A", WHOLE, inputs, rank, inputs * rank, is_product=name != EMBEDDING),
        Operation("B", WHOLE, rank, outputs, rank * outputs),
    )
    return Site(name, (name,), STREAM, pair)


def _ia3_site(method: Ia3Config, target: Projection) -> Site:
    if target.name in method.feedforward:  # scales what the linear reads: o and down read split features
        return _vector(target.name, (target.name,), INSIDE, target.in_features)
    return _vector(target.name, (target.name,), _output_of(target), target.out_features)


def _bottleneck_site(method: BottleneckConfig, target: Projection) -> Site:
    inputs = target.in_features if method.parallel else target.out_features
    attachment = _beside(target) if method.parallel else _output_of(target)
    operations = (
        Operation("down", LINEAR, inputs, method.size, inputs * method.size, has_bias=True),
        Operation(
            "up", LINEAR, method.size, target.out_features, method.size * target.out_features, has_bias=True
        ),
    )
    return Site(target.name, (target.name,), attachment, operations, has_activation=True)


def _beside(target: Projection) -> Attachment:
    """From a linear's input to its finished output: behind an activation no sum stays open for the backbone's
    all-reduce to close."""
    return {COLUMN: COLUMN, ROW: ACROSS}[BACKBONE[target.group]]


def _output_of(target: Projection) -> Attachment:
    """A finished output: that of a row-parallel linear after the backbone's all-reduce."""
    return {COLUMN: INSIDE, ROW: STREAM}[BACKBONE[target.group]]


def _vector(
    name: str, targets: tuple[str, ...], attachment: Attachment, features: int, rows: int = 1
) -> Site:
    operation = Operation(
        name.rpartition(".")[2], ELEMENTWISE, features, features, rows * features, is_product=False
    )
    return Site(name, targets, attachment, (operation,))
