"""FlexLLM's dependent parallelization (arXiv 2402.18789): bypasses laid out to fit the backbone's fixed plan.

The backbone is tensor-parallel as in Megatron. Of every bypass all compositions of states are enumerated that
start and end in the states of the backbone's tensors, forward and backward; the cheapest is taken, and is what the
compiled programs and the serving path execute. No tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, product

from services.gpu_worker.compiler.parallel_cost import (
    H200_NVLINK,
    Cost,
    Hardware,
    StepCollective,
    Workload,
    composition_cost,
    step_collectives,
    weight_bytes,
)
from services.gpu_worker.compiler.parallel_sites import Site, bypass_sites
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.layouts import (
    ALONE,
    ONE_RANK,
    Attachment,
    Collective,
    Composition,
    Form,
    Layout,
    Move,
    Rule,
    Split,
    State,
    check_tensor_parallel,
)
from services.gpu_worker.model.peft import Method


@dataclass(frozen=True, slots=True)
class Candidate:
    """A legal layout of one bypass; costs are those of one rank."""

    composition: Composition
    shardings: tuple[tuple[str, Split | None], ...]  # parameter and the dimension that is divided
    steps: tuple[StepCollective, ...]  # once an optimizer step
    cost: Cost
    weight_bytes: int  # with gradients and the optimizer's state

    @property
    def name(self) -> str:
        return self.composition.name

    @property
    def forms(self) -> tuple[Form, ...]:
        return tuple(rule.form for rule in self.composition.rules)

    @property
    def forward_collectives(self) -> tuple[Collective, ...]:
        return _collectives(self.composition.forward)

    @property
    def backward_collectives(self) -> tuple[Collective, ...]:
        return _collectives(self.composition.backward)

    @property
    def cost_us(self) -> float:
        return self.cost.total


@dataclass(frozen=True, slots=True)
class BypassPlan:
    site: Site
    candidates: tuple[Candidate, ...]  # cheapest first

    @property
    def chosen(self) -> Candidate:
        """The cheapest: what training and serving execute."""
        return self.candidates[0]


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """The plan of one layer; every layer has the same."""

    tp: int
    plans: tuple[BypassPlan, ...]

    @property
    def layout(self) -> Layout:
        """What is chosen; one rank alone has nothing to lay out."""
        if self.tp == 1:
            return ONE_RANK
        return Layout(self.tp, {plan.site.name: plan.chosen.composition for plan in self.plans})

    def plan_of(self, site: str) -> BypassPlan:
        for plan in self.plans:
            if plan.site.name == site:
                return plan
        raise KeyError(f"no bypass {site!r} in the plan, only {[plan.site.name for plan in self.plans]}")


def parallelize(
    config: ModelConfig,
    method: Method,
    tp: int,
    hardware: Hardware = H200_NVLINK,
    workload: Workload | None = None,
) -> ParallelPlan:
    """Raises UnsupportedModel where `tp` ranks cannot share the backbone evenly."""
    check_tensor_parallel(config, tp)
    workload = workload or Workload()
    plans = [plan_bypass(site, tp, hardware, workload) for site in bypass_sites(method, config)]
    return ParallelPlan(tp, tuple(plans))


def plan_bypass(site: Site, tp: int, hardware: Hardware, workload: Workload) -> BypassPlan:
    """All candidates of a bypass, the cheapest first; of equal ones, the one whose forms come first.

    Adjoints may differ where the forward is the same: the cheaper one stays.
    """
    found: dict[tuple[Form, ...], Candidate] = {}
    for composition in compositions(site, tp):
        candidate = Candidate(
            composition=composition,
            shardings=tuple(
                (operation.parameter, rule.split)
                for operation, rule in zip(site.operations, composition.rules, strict=True)
            ),
            steps=step_collectives(site, composition, tp),
            cost=composition_cost(site, composition, tp, hardware, workload),
            weight_bytes=weight_bytes(site, composition, tp, workload),
        )
        known = found.setdefault(candidate.forms, candidate)
        if candidate.cost_us < known.cost_us:
            found[candidate.forms] = candidate
    return BypassPlan(site, tuple(sorted(found.values(), key=lambda c: (c.cost_us, c.forms))))


def compositions(site: Site, tp: int) -> Iterable[Composition]:
    """Every legal composition, adjoints included."""
    attachment = site.attachment if tp > 1 else ALONE
    for rules in product(*(operation.rules for operation in site.operations)):
        composition = _compose(rules, attachment)
        moves = (*composition.forward, *composition.backward)
        if all(move.is_possible for move in moves) and _is_legal(site, composition, attachment, tp):
            yield composition


def _compose(rules: tuple[Rule, ...], attachment: Attachment) -> Composition:
    """The moves between neighbours; they may not exist."""
    forward = _chain(attachment.x, [(rule.x, rule.y) for rule in rules], attachment.y)
    backward = _chain(attachment.dy, [(rule.dy, rule.dx) for rule in reversed(rules)], attachment.dx)
    return Composition(rules, forward, backward)


def _chain(start: State, products: list[tuple[State, State]], end: State) -> tuple[Move, ...]:
    states = [start, *(state for pair in products for state in pair), end]
    return tuple(Move(*pair) for pair in list(pairwise(states))[::2])


def _is_legal(site: Site, composition: Composition, attachment: Attachment, tp: int) -> bool:
    first, *inner, last = (move.collective for move in composition.forward)
    if len(composition.rules) == 1:  # works in place on the backbone's own tensor
        moves = (*composition.forward, *composition.backward)
        return all(move.collective is Collective.KEEP for move in moves) and _fits(site, composition, tp)
    return (
        # a slice of the backbone's input and a share of its output are free; elsewhere both waste products
        first is not Collective.PAD
        and last is not Collective.PARTITION
        and not any(c in (Collective.PAD, Collective.PARTITION) for c in inner)
        # what a second transfer buys, a single one of the rank-r tensor buys for less
        and len(_collectives(composition.forward)) <= 1
        # the rank is no dimension of the backbone's plan, and may be smaller than the group
        and all(State.FEATURES not in (a.y, b.x) for a, b in pairwise(composition.rules))
        and _closes_sums(site, composition, attachment)
        and _fits(site, composition, tp)
    )


def _closes_sums(site: Site, composition: Composition, attachment: Attachment) -> bool:
    """A sum may stay open through a product only where the backbone's own all-reduce closes it."""
    stays_open = any(rule.x is State.PARTIAL for rule in composition.rules)
    return not stays_open or (attachment.y is State.PARTIAL and not site.has_activation)


def _fits(site: Site, composition: Composition, tp: int) -> bool:
    """Weights are divided evenly; tokens need not be."""
    dimensions = [
        operation.in_features if rule.split is Split.IN else operation.out_features
        for operation, rule in zip(site.operations, composition.rules, strict=True)
        if rule.split is not None
    ]
    return all(size % tp == 0 for size in dimensions)


def _collectives(moves: tuple[Move, ...]) -> tuple[Collective, ...]:
    return tuple(move.collective for move in moves if not move.collective.is_free)
