"""A method's parameters as one rank of a tensor-parallel group holds them, and whole, as files have them.

A parameter follows the backbone's tensor beside it: where the rank's shape is smaller than the whole one, the
ranks share that dimension; where both are the same, every rank has all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.gpu_worker.model.parameters import Key, Parameter, parameters
from services.gpu_worker.model.peft import Method, PrefixConfig
from services.gpu_worker.model.weights import ModelWeights


class ParameterShards:
    """`own` and `whole` list the same parameters in the same order; a flat tensor holds them one after another."""

    def __init__(self, base: ModelWeights, method: Method) -> None:
        self.own = parameters(base.config, method)
        self.whole = parameters(base.whole, method)
        self._group = base.group
        # a prefix's rows are the keys and values of each layer side by side: each of these is shared
        self._blocks = 2 * base.config.num_layers if isinstance(method, PrefixConfig) else 1
        pairs = zip(self.own, self.whole, strict=True)
        self._dims: dict[Key, int | None] = {own.place: _divided(own, whole) for own, whole in pairs}

    def dim(self, place: Key) -> int | None:
        """The dimension that the ranks share; None: every rank has all."""
        return self._dims[place]

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


def _divided(own: Parameter, whole: Parameter) -> int | None:
    different = [i for i, pair in enumerate(zip(own.shape, whole.shape, strict=True)) if len(set(pair)) > 1]
    assert len(different) <= 1, f"{own.key}: {own.shape} of {whole.shape}"
    return different[0] if different else None
