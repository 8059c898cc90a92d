"""What a parallel layout of a bypass costs an iteration, from a roofline of the hardware. No tensors."""

from __future__ import annotations

from dataclasses import dataclass

from services.gpu_worker.compiler.parallel_sites import Operation, Site
from services.gpu_worker.model.layouts import Collective, Composition, Move, Rule, Split, State

GRADIENT_BYTES = 4  # gradients, master weights and AdamW's two moments are float32
OPTIMIZER_BYTES = 4 * GRADIENT_BYTES


@dataclass(frozen=True, slots=True)
class Hardware:
    """One rank of the group. Bandwidths are per rank and direction."""

    name: str
    flops: float  # a second, dense products in the model's dtype
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second
    link_latency: float  # seconds a collective


# Vendors' specification numbers (bfloat16, dense; NVLink's total halved to one direction), not measurements;
# latencies and the CPU's numbers are the order of magnitude of small collectives and of a small server.
H200_NVLINK = Hardware("H200, NVLink", 989e12, 4.8e12, 450e9, 10e-6)
A100_NVLINK = Hardware("A100-80GB, NVLink", 312e12, 2.0e12, 300e9, 12e-6)
CPU_GLOO = Hardware("CPU, gloo", 4e11, 40e9, 1e9, 500e-6)


@dataclass(frozen=True, slots=True)
class Workload:
    tokens: int = 256  # of the windows of an iteration
    iterations_per_step: int = 32  # passes over them between two optimizer steps
    element_size: int = 2  # bytes of weights and activations


@dataclass(frozen=True, slots=True)
class StepCollective:
    """Once an optimizer step: the sum of a gradient, or what DoRA's norms need."""

    subject: str
    collective: Collective
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds an iteration and rank."""

    products: float
    collectives: float
    step: float
    memory: float

    @property
    def total(self) -> float:
        return self.products + self.collectives + self.step + self.memory


def composition_cost(
    site: Site, composition: Composition, tp: int, hardware: Hardware, workload: Workload
) -> Cost:
    steps = step_collectives(site, composition, tp)
    steps_s = sum(_link_s(step.collective, step.size_bytes, tp, hardware) for step in steps)
    resident = weight_bytes(site, composition, tp, workload)
    return Cost(
        products=1e6 * sum(_product_s(*pair, tp, hardware, workload) for pair in _pairs(site, composition)),
        collectives=1e6 * _moves_s(site, composition, tp, hardware, workload),
        step=1e6 * steps_s / workload.iterations_per_step,
        # memory has no price of its own: a byte kept costs what streaming it once an iteration would
        memory=1e6 * resident / hardware.memory_bandwidth,
    )


def _moves_s(site: Site, composition: Composition, tp: int, hardware: Hardware, workload: Workload) -> float:
    """Seconds on the links, forward and backward, of an iteration."""

    def seconds(moves: tuple[Move, ...], widths: tuple[int, ...]) -> float:
        row = workload.tokens * workload.element_size
        sized = zip(moves, widths, strict=True)
        return sum(_link_s(move.collective, width * row, tp, hardware) for move, width in sized)

    return seconds(composition.forward, site.widths) + seconds(composition.backward, site.widths[::-1])


def weight_bytes(site: Site, composition: Composition, tp: int, workload: Workload) -> int:
    """Of a rank: weights, float32 master weights, moments and gradients."""
    numbers = sum(num_local(op, rule, tp) for op, rule in _pairs(site, composition))
    return numbers * (workload.element_size + OPTIMIZER_BYTES)


def num_local(operation: Operation, rule: Rule, tp: int) -> int:
    """Parameters on a rank; a bias [out] is split only with the columns."""
    weight = operation.num_parameters // (1 if rule.split is None else tp)
    bias = operation.out_features // (tp if rule.split is Split.OUT else 1)
    return weight + (bias if operation.has_bias else 0)


def step_collectives(site: Site, composition: Composition, tp: int) -> tuple[StepCollective, ...]:
    """Sums of the gradients of replicated parameters, then what DoRA's norms read from other ranks."""
    found = []
    for operation, rule in _pairs(site, composition):
        if rule.is_partial_gradient:
            size = operation.num_parameters * GRADIENT_BYTES
            found.append(StepCollective(operation.parameter, Collective.ALL_REDUCE, size))
        if operation.has_bias and rule.dy in (State.TOKENS, State.PARTIAL):
            size = operation.out_features * GRADIENT_BYTES
            found.append(StepCollective(f"{operation.parameter}.bias", Collective.ALL_REDUCE, size))
    if site.needs_norms and tp > 1:
        found += _norm_collectives(site, composition)
    return tuple(found)


def _norm_collectives(site: Site, composition: Composition) -> list[StepCollective]:
    """A rank forms BA only where its part of W lies: all columns of some rows, or some columns of all rows."""
    by_rows = site.attachment.x is State.FEATURES
    unlike = Split.OUT if by_rows else Split.IN
    found = [
        StepCollective(operation.parameter, Collective.ALL_GATHER, operation.num_parameters * GRADIENT_BYTES)
        for operation, rule in _pairs(site, composition)
        if rule.split is unlike
    ]
    if by_rows:
        found.append(StepCollective("squared norms", Collective.ALL_REDUCE, site.widths[-1] * GRADIENT_BYTES))
    return found


def _pairs(site: Site, composition: Composition) -> list[tuple[Operation, Rule]]:
    return list(zip(site.operations, composition.rules, strict=True))


def _product_s(operation: Operation, rule: Rule, tp: int, hardware: Hardware, workload: Workload) -> float:
    """Of the forward, of dX and of dW: three products of the same three sizes."""
    if not operation.is_product:
        return 0.0
    rows = workload.tokens / (tp if rule.x is State.TOKENS else 1)
    inputs = operation.in_features / (tp if rule.split is Split.IN else 1)
    outputs = operation.out_features / (tp if rule.split is Split.OUT else 1)
    moved = (rows * inputs + inputs * outputs + rows * outputs) * workload.element_size
    return 3 * max(2 * rows * inputs * outputs / hardware.flops, moved / hardware.memory_bandwidth)


def _link_s(collective: Collective, size_bytes: float, tp: int, hardware: Hardware) -> float:
    if collective.is_free or tp == 1:
        return 0.0
    return hardware.link_latency + size_bytes * collective.wire_share(tp) / hardware.link_bandwidth
