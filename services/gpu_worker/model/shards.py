"""A method's parameters as one rank of a tensor-parallel group holds them, and whole, as files have them.

Which dimension of a parameter the ranks share, and what they do between its products, is the layout's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from services.gpu_worker.kernels.bypass import Moves
from services.gpu_worker.model.config import ModelConfig
from services.gpu_worker.model.layouts import BACKBONE, COLUMN, Layout, Move, Rule, Split
from services.gpu_worker.model.parallel import rank_major_rows
from services.gpu_worker.model.parameters import Key, Parameter, parameters
from services.gpu_worker.model.peft import LoraConfig, Method, PrefixConfig, Projection, projections
from services.gpu_worker.model.weights import ModelWeights

SECOND = ("b", "up_w", "up_b")  # roles that a site's second product reads; others are of its first


def find_rule(parameter: Parameter, method: Method, whole: ModelConfig, layout: Layout) -> Rule | None:
    """How the product that reads a parameter is computed; None: by every rank alone."""
    site = parameter.module
    if isinstance(method, LoraConfig) and parameter.layer is not None:
        site = projections(whole)[site].group
        site = f"{site}.magnitude" if parameter.role == "magnitude" else site
    return layout.find_rule(site, 1 if parameter.role in SECOND else 0)


def divided_dim(parameter: Parameter, rule: Rule | None) -> int | None:
    """The dimension that the ranks share; a vector is divided with the output alone, prefixes by features."""
    if rule is None or rule.split is None:
        return None
    if len(parameter.shape) == 1:
        return 0 if rule.split is Split.OUT else None
    return 1 if parameter.key == "prefix.rows" else int(rule.split)


def rank_parameters(whole: ModelConfig, method: Method, layout: Layout) -> list[Parameter]:
    """`parameters` of the whole model with the shapes of one rank's part."""
    found = []
    for parameter in parameters(whole, method):
        dim = divided_dim(parameter, find_rule(parameter, method, whole, layout))
        shape = tuple(size // layout.tp if i == dim else size for i, size in enumerate(parameter.shape))
        found.append(replace(parameter, shape=shape))
    return found


class ParameterShards:
    """`own` and `whole` list the same parameters in the same order; a flat tensor holds them one after another."""

    def __init__(self, base: ModelWeights, method: Method, layout: Layout) -> None:
        assert layout.tp == base.group.size, f"a layout for {layout.tp} ranks on {base.group.size}"
        self.own = rank_parameters(base.whole, method, layout)
        self.whole = parameters(base.whole, method)
        self.layout = layout
        self._group, self._device = base.group, base.device
        self._projections = projections(base.whole)
        # a prefix's rows are the keys and values of each layer side by side: each of these is shared
        self._blocks = 2 * base.config.num_layers if isinstance(method, PrefixConfig) else 1
        rules = {p.place: find_rule(p, method, base.whole, layout) for p in self.whole}
        self._dims = {p.place: divided_dim(p, rules[p.place]) for p in self.whole}
        self._partial = {
            place for place, rule in rules.items() if rule is not None and rule.is_partial_gradient
        }
        self._shapes = {p.place: p.shape for p in self.own}

    def dim(self, place: Key) -> int | None:
        """The dimension that the ranks share; None: every rank has all."""
        return self._dims[place]

    def is_partial(self, place: Key) -> bool:
        """Whether every rank has all of the parameter, but only a part of its gradient."""
        return place in self._partial

    def shape(self, place: Key) -> tuple[int, ...]:
        """Of the rank's part."""
        return self._shapes[place]

    # --- a layer's bypasses

    def moves(self, site: str, widths: tuple[int, int, int]) -> Moves:
        """What the serving path does around a site's two products; `widths` are those of the whole model's input,
        inner tensor and output."""
        composition = self.layout.find(site)
        if composition is None:
            return Moves()
        steps = zip(composition.forward, widths, strict=True)
        return Moves(*(self._move(step, width) for step, width in steps))

    def _move(self, step: Move, width: int) -> Callable[[Tensor, int], Tensor] | None:
        if step.stays:
            return None
        return lambda x, rows: self._group.move(x, step, rows, width)

    def fused_rows(self, group: str) -> tuple[int, dict[str, slice | Tensor]]:
        """Rows of a fused linear's stacked B on a rank: their number, and by projection which are its own.

        A rank that holds all of them has them in the order in which a move divides them.
        """
        members = [p for p in self._projections.values() if p.group == group]
        blocks = [p.out_features for p in members]
        rule, tp = self.layout.find_rule(group, 1), self.layout.tp
        if rule is not None and rule.split is None and BACKBONE[group] is COLUMN:
            places = rank_major_rows(blocks, tp).argsort().to(self._device)
            return sum(blocks), {p.name: places[p.rows] for p in members}
        parts = tp if rule is not None and rule.split is Split.OUT else 1
        ends = [0, *(p.rows.stop // parts for p in members)]
        spans = [slice(*span) for span in pairwise(ends)]
        return ends[-1], {p.name: span for p, span in zip(members, spans, strict=True)}

    def beside_weight(
        self, values: Mapping[Key, Tensor], layer: int, projection: Projection, role: str
    ) -> Tensor:
        """A rank's A or B as its part of the linear's weight lies; every rank has to call it."""
        place = layer, f"{projection.name}.{role}"
        value = values[place]
        wanted = {(True, "b"): Split.OUT, (False, "a"): Split.IN}.get((self._is_by_columns(projection), role))
        dim = self._dims[place]
        if self._group.size == 1 or dim == wanted:
            return value
        if dim is None:
            assert wanted is not None
            return self._group.part(value, wanted)
        return self._group.all_gather(value, dim, value.shape[dim] * self._group.size)

    def _is_by_columns(self, projection: Projection) -> bool:
        return BACKBONE[projection.group] is COLUMN

    # --- values

    def part(self, parameter: Parameter, value: Tensor) -> Tensor:
        """The rank's part of a whole parameter."""
        dim = self._dims[parameter.place]
        if dim is None:
            return value
        blocks = value.unflatten(dim, (self._blocks, -1))
        return self._group.part(blocks, dim + 1).flatten(dim, dim + 1)

    def cut(self, flat: Tensor) -> Tensor:
        """From all whole parameters to the rank's."""
        if self._group.size == 1:
            return flat
        values = flat.split([parameter.numel for parameter in self.whole])
        return torch.cat(
            [
                self.part(own, value.view(whole.shape)).reshape(-1)
                for own, whole, value in zip(self.own, self.whole, values, strict=True)
            ]
        )

    def gather(self, flat: Tensor) -> Tensor:
        """From the ranks' parameters, which are as many on each, to the whole ones; every rank has to call it."""
        size = self._group.size
        if size == 1:
            return flat
        ranks = self._group.all_gather(flat[None], 0, size)
        values = ranks.split([parameter.numel for parameter in self.own], dim=1)
        return torch.cat(
            [
                self._join(parameter, value).reshape(-1)
                for parameter, value in zip(self.own, values, strict=True)
            ]
        )

    def by_place(self, flat: Tensor) -> dict[Key, Tensor]:
        """Views of a flat tensor of the whole parameters."""
        values = flat.split([parameter.numel for parameter in self.whole])
        return {p.place: value.view(p.shape) for p, value in zip(self.whole, values, strict=True)}

    def _join(self, parameter: Parameter, ranks: Tensor) -> Tensor:
        """`ranks` [ranks, numel]."""
        dim = self._dims[parameter.place]
        parts = [part.view(parameter.shape) for part in ranks.unbind()]
        if dim is None:
            return parts[0]
        joined = torch.cat([part.unflatten(dim, (self._blocks, -1)) for part in parts], dim + 1)
        return joined.flatten(dim, dim + 1)
