"""How a tensor lies on the ranks of a tensor-parallel group, and which layouts a product accepts. No tensors.

The states are FlexLLM's (arXiv 2402.18789): whole `-`, partitioned `|`, replicated `=`, pre-reduce `+`. A move
changes a tensor's state, never its value. A gradient is one logical tensor as well, so the adjoint of a move
is the move that takes the gradient to the state which the backward of the tensor's producer accepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum

from services.gpu_worker.model.config import ModelConfig, UnsupportedModel


class State(Enum):
    """Of a tensor [tokens, features]."""

    WHOLE = "-"  # on one rank
    REPLICATED = "="  # the same on every rank
    TOKENS = "|tokens"  # every rank has some of the rows
    FEATURES = "|features"  # every rank has some of the columns
    PARTIAL = "+"  # pre-reduce: the value is the sum over the ranks


class Collective(StrEnum):
    KEEP = "keep"
    PARTITION = "partition"  # each rank takes its slice of what it has
    PAD = "pad"  # each rank's slice among zeros is its share of a sum: the adjoint of partition
    REPLICATE = "replicate"
    ALL_GATHER = "all_gather"
    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"

    @property
    def is_free(self) -> bool:
        """Nothing goes over a link."""
        return self in (Collective.KEEP, Collective.PARTITION, Collective.PAD)

    def wire_share(self, tp: int) -> float:
        """Bytes that a rank sends, as a share of the logical tensor's (ring algorithms)."""
        if self.is_free or tp == 1:
            return 0.0
        if self is Collective.REPLICATE:
            return 1.0
        if self is Collective.ALL_TO_ALL:
            return (tp - 1) / tp**2
        return (2 if self is Collective.ALL_REDUCE else 1) * (tp - 1) / tp


_SPLITS = (State.TOKENS, State.FEATURES)
MOVES: dict[tuple[State, State], Collective] = {
    **{(state, state): Collective.KEEP for state in State},
    (State.WHOLE, State.REPLICATED): Collective.REPLICATE,
    (State.PARTIAL, State.REPLICATED): Collective.ALL_REDUCE,
    **{(State.REPLICATED, split): Collective.PARTITION for split in _SPLITS},
    **{(split, State.PARTIAL): Collective.PAD for split in _SPLITS},
    **{(split, State.REPLICATED): Collective.ALL_GATHER for split in _SPLITS},
    **{(State.PARTIAL, split): Collective.REDUCE_SCATTER for split in _SPLITS},
    (State.TOKENS, State.FEATURES): Collective.ALL_TO_ALL,
    (State.FEATURES, State.TOKENS): Collective.ALL_TO_ALL,
}


@dataclass(frozen=True, slots=True)
class Move:
    source: State
    target: State

    @property
    def stays(self) -> bool:
        return self.source is self.target

    @property
    def collective(self) -> Collective:
        return MOVES[self.source, self.target]

    @property
    def is_possible(self) -> bool:
        return (self.source, self.target) in MOVES


class Form(IntEnum):
    """FlexLLM's forms of a product `x W`."""

    REPLICATED = 1
    CONTRACTION = 2
    TOKENS = 3
    COLUMNS = 4

    @property
    def symbol(self) -> str:
        return "①②③④"[self - 1]


class Split(IntEnum):
    """Dimension of a weight [out, in] that is divided among the ranks; a vector [out] has OUT alone."""

    OUT = 0
    IN = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """One legal way to compute `y = x W` and its adjoint on every rank without talking to another."""

    form: Form
    x: State
    split: Split | None  # of W; None: every rank has all of it
    y: State
    dy: State
    dx: State
    is_partial_gradient: bool  # dW is `+`: to be all-reduced before the optimizer's step


_WHOLE, _SAME, _TOKENS, _FEATURES, _SUM = State
_REPLICATED = (
    Rule(Form.REPLICATED, _WHOLE, None, _WHOLE, _WHOLE, _WHOLE, False),
    Rule(Form.REPLICATED, _SAME, None, _SAME, _SAME, _SAME, False),
    Rule(Form.REPLICATED, _SAME, None, _SAME, _SUM, _SUM, True),
)
LINEAR: tuple[Rule, ...] = (
    *_REPLICATED,
    Rule(Form.REPLICATED, _SUM, None, _SUM, _SAME, _SAME, True),  # linear in x, so a sum may stay open
    Rule(Form.CONTRACTION, _FEATURES, Split.IN, _SUM, _SAME, _FEATURES, False),
    Rule(Form.TOKENS, _TOKENS, None, _TOKENS, _TOKENS, _TOKENS, True),
    Rule(Form.COLUMNS, _SAME, Split.OUT, _FEATURES, _FEATURES, _SUM, False),
)
WHOLE: tuple[Rule, ...] = _REPLICATED  # outside the layers, where every rank computes all
ELEMENTWISE: tuple[Rule, ...] = (  # a vector over the features, or rows in front of the tensor's own
    *_REPLICATED,
    Rule(Form.TOKENS, _TOKENS, None, _TOKENS, _TOKENS, _TOKENS, True),
    Rule(Form.COLUMNS, _FEATURES, Split.OUT, _FEATURES, _FEATURES, _FEATURES, False),
)


@dataclass(frozen=True, slots=True)
class Attachment:
    """States of the backbone's tensors where a bypass reads (x) and adds (y), and of their gradients."""

    x: State
    y: State
    dy: State
    dx: State


# Megatron's plan (arXiv 1909.08053): qkv and gate_up by columns, o and down by rows and then an all-reduce,
# in the backward an all-reduce of dX in front of the column-parallel ones.
COLUMN = Attachment(x=_SAME, y=_FEATURES, dy=_FEATURES, dx=_SUM)
ROW = Attachment(x=_FEATURES, y=_SUM, dy=_SAME, dx=_FEATURES)
INSIDE = Attachment(*[_FEATURES] * 4)  # between a column-parallel linear and a row-parallel one
STREAM = Attachment(*[_SAME] * 4)  # the residual stream, the embedding, the head
ACROSS = Attachment(x=_FEATURES, y=_SAME, dy=_SAME, dx=_FEATURES)  # a row-parallel linear and its all-reduce
ALONE = Attachment(*[_WHOLE] * 4)  # one rank
BACKBONE = {"qkv": COLUMN, "o": ROW, "gate_up": COLUMN, "down": ROW}


@dataclass(frozen=True, slots=True)
class Composition:
    """Products in the order of the forward, and the moves before, between and after them.

    `backward` starts at the gradient of the output: its first move leads to the last product.
    """

    rules: tuple[Rule, ...]
    forward: tuple[Move, ...]
    backward: tuple[Move, ...]

    @property
    def name(self) -> str:
        return "+".join(rule.form.symbol for rule in self.rules)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a method's bypasses lie on the `tp` ranks that share a model: the composition of each site, by its name.

    Sites are LoRA's fused linears, other methods' targets, `<group>.magnitude` and prefix. Of a site that is not
    named every rank has all, and computes it alone.
    """

    tp: int = 1
    compositions: Mapping[str, Composition] = field(default_factory=dict)

    def find(self, site: str) -> Composition | None:
        return self.compositions.get(site)

    def find_rule(self, site: str, product: int) -> Rule | None:
        composition = self.compositions.get(site)
        return None if composition is None else composition.rules[product]


ONE_RANK = Layout()


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Raises UnsupportedModel naming what `tp` ranks cannot share evenly."""
    if tp < 1:
        raise UnsupportedModel(f"tensor parallelism over {tp} ranks: at least one is needed")
    sizes = {
        "key/value heads": config.num_kv_heads,
        "attention heads": config.num_heads,
        "features of the feed-forward layer": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % tp:
            raise UnsupportedModel(
                f"tensor parallelism over {tp} ranks: they cannot share {size} {name} evenly"
            )
