"""Adapters on the device, in the layout that the layers compute with: many at once, of any method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from services.gpu_worker.kernels.bypass import Bottleneck, Bypass, Moves
from services.gpu_worker.kernels.lora_stream import LoraPairs
from services.gpu_worker.kernels.norm_rope import accumulation_dtype
from services.gpu_worker.model.layouts import BACKBONE, ONE_RANK, ROW, Layout, State
from services.gpu_worker.model.parameters import Key, Parameter
from services.gpu_worker.model.peft import (
    EMBEDDING,
    GROUPS,
    HEAD,
    BottleneckConfig,
    LoraConfig,
    Method,
    Projection,
    check_method,
    num_virtual_tokens,
    projections,
)
from services.gpu_worker.model.shards import ParameterShards
from services.gpu_worker.model.weights import ModelWeights

NORM_ROWS = 1024  # of a weight that exist in float32 at a time


class AdapterWeights:
    """One adapter: for each layer the bypass of each fused linear, and what lies outside the layers.

    Values are set from a method's parameters by `load`; scalings are folded in. All are those of one rank.
    """

    def __init__(
        self,
        base: ModelWeights,
        method: Method,
        layout: Layout = ONE_RANK,
        device: torch.device | None = None,
    ) -> None:
        """`layout` is for as many ranks as share the base; `device` is its own, or "meta" where only sizes matter."""
        check_method(method, base.config)
        self._device = device or base.device
        self.method = method
        self.shards = ParameterShards(base, method, layout)
        self.parameters = self.shards.own
        self.num_virtual_tokens = num_virtual_tokens(method)
        self.columns: dict[str, slice] = {}  # LoRA's targets -> their columns of the stacked rank
        self.rows: dict[str, slice | Tensor] = {}  # and their rows of the stacked B
        self.layers: list[dict[str, Bypass]] = []
        self.inverse_norms: dict[Key, Tensor] = {}  # DoRA: 1 / length of each row, constant in the gradient
        self.outside: dict[str, Tensor] = {}  # "embed_tokens.a" ..., "prompt.rows", "prefix.rows"
        self._base = base
        self._projections = projections(base.config)
        self._stack()
        for layer in range(base.config.num_layers):
            self.layers.append(self._empty_layer([p for p in self.parameters if p.layer == layer]))
        for parameter in self.parameters:
            if parameter.layer is None:
                self.outside[parameter.key] = self._zeros(*parameter.shape)

    @property
    def sites(self) -> frozenset[str]:
        """Where in a layer the adapter does something: fused linears, and their inputs as `<group>_in`."""
        found = set()
        for layer in self.layers:
            for group, bypass in layer.items():
                if bypass.input_scale is not None:
                    found.add(f"{group}_in")
                if bypass.a is not None or bypass.bases:
                    found.add(group)
        return frozenset(found | ({"prefix"} if "prefix.rows" in self.outside else set()))

    @property
    def size_bytes(self) -> int:
        outside = sum(t.nbytes for t in self.outside.values())
        lengths = sum(p.numel for p in self.parameters if p.role == "magnitude")  # those of `inverse_norms`
        bypasses = sum(bypass.size_bytes for layer in self.layers for bypass in layer.values())
        return outside + bypasses + lengths * accumulation_dtype(self._base.dtype).itemsize

    def prefix(self, layer: int) -> tuple[Tensor, Tensor]:
        """Learned keys and values of one layer, [num_virtual_tokens, G * E] each."""
        width = self._base.config.kv_size
        rows = self.outside["prefix.rows"][:, 2 * layer * width : 2 * (layer + 1) * width]
        return rows[:, :width], rows[:, width:]

    def low_rank(self, module: str) -> tuple[Tensor, Tensor] | None:
        """A and the scaled B of the embedding or the head."""
        a, b = self.outside.get(f"{module}.a"), self.outside.get(f"{module}.b")
        return None if a is None or b is None else (a, b)

    @property
    def is_low_rank(self) -> bool:
        """Whether it does no more to the layers, nor to what they read, than add low-rank parts to linears."""
        is_plain = isinstance(self.method, LoraConfig) and not self.method.dora
        return is_plain and self.low_rank(EMBEDDING) is None

    @cached_property
    def low_rank_pairs(self) -> LoraPairs | None:
        """The low-rank parts of all layers; None where ranks move tensors between the products."""
        bypasses = [[layer.get(group) for group in GROUPS] for layer in self.layers]
        if any(b is not None and b.moves != Moves() for layer in bypasses for b in layer):
            return None
        return LoraPairs([[None if b is None else b.pair for b in layer] for layer in bypasses])

    def divides_input(self, group: str) -> bool:
        """Whether a fused linear reads only the rank's part of the features."""
        return self._base.group.size > 1 and BACKBONE[group] is ROW

    def part_of_input(self, group: str) -> tuple[int, int]:
        """Which part, and of how many, of the features a fused linear reads."""
        return (self._base.group.rank, self._base.group.size) if self.divides_input(group) else (0, 1)

    # --- layout

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._base.dtype, device=self._device)

    def _stack(self) -> None:
        if not isinstance(self.method, LoraConfig):
            return
        stacked: dict[str, int] = {}
        for name, projection in self._projections.items():
            if name in self.method.targets:
                start = stacked.get(projection.group, 0)
                stacked[projection.group] = start + self.method.rank
                self.columns[name] = slice(start, start + self.method.rank)
        for group in stacked:
            self.rows |= self.shards.fused_rows(group)[1]

    def _empty_layer(self, own: list[Parameter]) -> dict[str, Bypass]:
        bypasses: dict[str, Bypass] = {}
        for parameter in own:
            projection = self._projections[parameter.module]
            bypass = bypasses.setdefault(projection.group, Bypass())
            self._make_room(bypass, projection, parameter)
        return bypasses

    def _make_room(self, bypass: Bypass, projection: Projection, parameter: Parameter) -> None:
        """Tensors for one parameter of a fused linear, where an earlier one has not made them."""
        role, layer, group = parameter.role, parameter.layer, projection.group
        if role == "a" and bypass.a is None:
            self._make_low_rank(bypass, group, parameter.shape[1])
        elif role in ("scale", "magnitude"):
            out = max(p.rows.stop for p in self._projections.values() if p.group == group)
            bypass.bases = (*bypass.bases, (projection.name, projection.rows))
            if bypass.scale is None:
                bypass.scale = self._zeros(out).fill_(1)
            has_bias = group == "qkv" and self._base.config.qkv_bias
            if role == "magnitude" and has_bias and bypass.shift is None:
                bypass.shift = self._zeros(out)
        elif role == "input_scale":
            bypass.input_scale = self._zeros(projection.in_features)
        elif role == "down_w":
            bypass.bottlenecks = (*bypass.bottlenecks, self._make_bottleneck(projection, layer))
            bypass.bases = (*bypass.bases, (projection.name, projection.rows))

    def _make_low_rank(self, bypass: Bypass, group: str, width: int) -> None:
        """`width` is A's on this rank."""
        members = [p for p in projections(self._base.whole).values() if p.group == group]
        rank = max(self.columns[p.name].stop for p in members if p.name in self.columns)
        bypass.a = self._zeros(rank, width)
        bypass.b = self._zeros(self.shards.fused_rows(group)[0], rank)
        widths = members[0].in_features, rank, members[-1].rows.stop
        bypass.moves = self.shards.moves(group, widths)

    def _make_bottleneck(self, projection: Projection, layer: int | None) -> Bottleneck:
        method, name = self.method, projection.name
        assert isinstance(method, BottleneckConfig)
        whole = projections(self._base.whole)[name]
        width = whole.in_features if method.parallel else whole.out_features

        def zeros(role: str) -> Tensor:
            return self._zeros(*self.shards.shape((layer, f"{name}.{role}")))

        return Bottleneck(
            name,
            projection.rows,
            method.activation,
            method.parallel,
            zeros("down_w"),
            zeros("down_b"),
            zeros("up_w"),
            zeros("up_b"),
            self.shards.moves(name, (width, method.size, whole.out_features)),
        )

    # --- values

    def load(self, values: Mapping[Key, Tensor]) -> None:
        """Rounds every parameter (shaped as `Parameter.shape`, on any device) into place."""
        for parameter in self.parameters:
            value = values[parameter.layer, parameter.key]
            if parameter.layer is None:
                scaled = parameter.key in (f"{EMBEDDING}.b", f"{HEAD}.b")
                self.outside[parameter.key].copy_(self._scaled(value) if scaled else value)
            elif parameter.role == "magnitude":
                self._set_magnitude(parameter, value, values)
            else:
                self._set(parameter, value)

    def _scaled(self, value: Tensor) -> Tensor:
        assert isinstance(self.method, LoraConfig | BottleneckConfig)
        return value.to(accumulation_dtype(value.dtype)) * self.method.scaling

    def _set(self, parameter: Parameter, value: Tensor) -> None:
        assert parameter.layer is not None
        projection = self._projections[parameter.module]
        bypass = self.layers[parameter.layer][projection.group]
        role = parameter.role
        if role == "a" and bypass.a is not None:
            bypass.a[self.columns[projection.name]].copy_(value)
        elif role == "b" and bypass.b is not None:
            rows, columns = self.rows[projection.name], self.columns[projection.name]
            bypass.b[rows, columns] = self._scaled(value).to(bypass.b.dtype)
        elif role == "scale" and bypass.scale is not None:
            bypass.scale[projection.rows].copy_(value)
        elif role == "input_scale" and bypass.input_scale is not None:
            bypass.input_scale.copy_(value)
        else:
            part = next(b for b in bypass.bottlenecks if b.name == projection.name)
            target: Tensor = getattr(part, role)
            rule = self.shards.layout.find_rule(projection.name, 0)
            if role == "down_b" and rule is not None and rule.y is State.PARTIAL:
                value = value / self._base.group.size  # every rank adds it to its part of the sum
            target.copy_(self._scaled(value) if role.startswith("up") else value)

    def _set_magnitude(self, parameter: Parameter, value: Tensor, values: Mapping[Key, Tensor]) -> None:
        """DoRA's factor: the magnitude over the length of the rows of W + scaling * B A."""
        assert parameter.layer is not None
        projection = self._projections[parameter.module]
        bypass = self.layers[parameter.layer][projection.group]
        assert bypass.scale is not None
        device, beside = self._base.device, self.shards.beside_weight
        a, b = (beside(values, parameter.layer, projection, role).to(device) for role in "ab")
        inverse = 1 / self.row_lengths(parameter.layer, projection, a, self._scaled(b))
        self.inverse_norms[parameter.layer, parameter.key] = inverse
        factor = value.to(device=device, dtype=inverse.dtype) * inverse
        bypass.scale[projection.rows].copy_(factor)
        if bypass.shift is not None:
            bias = self._base.layers[parameter.layer].qkv.bias
            assert bias is not None
            bypass.shift[projection.rows].copy_(bias[projection.rows].to(factor.dtype) * (1 - factor))

    def row_lengths(
        self, layer: int, projection: Projection, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        """Lengths [out] of the rows of W, or of W + `b` `a` (scaled), in float32 or wider."""
        weight = self._base.layers[layer].linear(projection.group).dense()[projection.rows]
        wide = accumulation_dtype(weight.dtype)
        lengths = []
        for start in range(0, weight.shape[0], NORM_ROWS):
            rows = weight[start : start + NORM_ROWS].to(wide)
            if a is not None and b is not None:
                rows = rows + b[start : start + NORM_ROWS].to(wide) @ a.to(wide)
            lengths.append(rows.norm(dim=1))
        found = torch.cat(lengths)
        if self.divides_input(projection.group):  # the other ranks have the rows' other columns
            found = self._base.group.all_reduce_(found.square()).sqrt()
        return found
