"""Decodes wait for memory and steps of training for arithmetic: a GPU may do both at once in less time than one after
the other, each more slowly than alone. They are measured with steps of the backward, which are most of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger(__name__)
BackwardStream = Literal["auto", "on", "off"]
WORTH = (
    0.92  # of the time of one after the other; what gains less is not worth what it makes harder to predict
)
MOST = 100.0  # times slower: what hardly moves while the other runs


@dataclass(frozen=True, slots=True)
class Overlap:
    """For how many milliseconds a forward and a backward ran, and for how many of them both."""

    forward_ms: float
    backward_ms: float
    both_ms: float = 0.0

    @classmethod
    def begun_at(cls, begun_ms: float, forward_ms: float, backward_ms: float) -> Overlap:
        """Of a backward that began `begun_ms` after the forward."""
        both_ms = min(forward_ms, begun_ms + backward_ms) - max(0.0, begun_ms)
        return cls(forward_ms, backward_ms, max(0.0, both_ms))

    @property
    def span_ms(self) -> float:
        return self.forward_ms + self.backward_ms - self.both_ms


@dataclass(frozen=True, slots=True)
class Interference:
    """How many times longer each takes while the other runs, at least once."""

    forward: float
    backward: float

    @classmethod
    def of(cls, alone: Overlap, together: Overlap) -> Interference:
        """Of the same work measured alone and begun at once."""
        both_ms = together.both_ms
        if both_ms <= 0:
            return cls(2.0, 2.0)  # as long as one after the other

        def slowdown(alone_ms: float, together_ms: float) -> float:
            done_ms = both_ms - (together_ms - alone_ms)  # of it while both ran
            return min(MOST, max(1.0, both_ms / done_ms)) if done_ms > 0 else MOST

        return cls(
            slowdown(alone.forward_ms, together.forward_ms), slowdown(alone.backward_ms, together.backward_ms)
        )

    def together_ms(self, forward_ms: float, backward_ms: float) -> float:
        """How long both take that begin at once; arguments are what each takes alone."""
        forward_ends, backward_ends = forward_ms * self.forward, backward_ms * self.backward
        if forward_ends < backward_ends:
            return backward_ms + forward_ends * (1 - 1 / self.backward)
        return forward_ms + backward_ends * (1 - 1 / self.forward)

    def room_ms(self, forward_ms: float, limit_ms: float) -> float:
        """The most backward, as it takes alone, with which `together_ms` keeps within the limit."""
        forward_ends = forward_ms * self.forward
        if limit_ms >= forward_ends:
            return limit_ms - forward_ends * (1 - 1 / self.backward)
        if limit_ms <= forward_ms:
            return 0.0
        return (limit_ms - forward_ms) / (self.backward * (1 - 1 / self.forward))

    def alone_ms(self, found: Overlap) -> tuple[float, float]:
        """What a forward and a backward that ran at once would each have taken alone."""
        return (
            found.forward_ms - found.both_ms * (1 - 1 / self.forward),
            found.backward_ms - found.both_ms * (1 - 1 / self.backward),
        )


ONE_AFTER_THE_OTHER = Interference(1.0, 1.0)  # takes times as they are


def choose(choice: BackwardStream, alone: Overlap, together: Overlap) -> Interference | None:
    """None where the backward is better off behind the forward; `choice` "on" wants it beside decodes all the same."""
    ratio = together.span_ms / alone.span_ms
    is_worth_it = together.both_ms > 0 and ratio < WORTH
    found = Interference.of(alone, together) if choice == "on" or is_worth_it else None
    log.info(
        "decodes (%.2f ms) and a backward (%.2f ms) at once take %.2f of one after the other: the backward goes %s",
        alone.forward_ms, alone.backward_ms, ratio,
        f"beside decodes, slowdowns {found.forward:.2f} and {found.backward:.2f}" if found else "behind them",
    )  # fmt: skip
    return found
