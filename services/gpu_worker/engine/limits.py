"""How long an iteration may take, by the next tokens that are due."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.engine.slo import FLEX, NUM_RANKS


@dataclass(frozen=True, slots=True)
class Limits:
    """Milliseconds by rank: until a sequence that does not yield to this rank needs its next token.

    Whoever is late with a prompt is not helped by smaller pieces of it, so only decodes set limits.
    """

    by_rank: tuple[float, ...]
    is_late: bool  # somebody's next token is overdue
    is_mixed: bool  # somebody's rank is FLEX and somebody's is not

    @classmethod
    def of(cls, decodes: Iterable[Sequence], now_s: float, idle_ms: float, margin: float) -> Limits:
        """`idle_ms` bounds all of them; of the time that is left `margin` is planned for."""
        due_s = [math.inf] * NUM_RANKS
        for sequence in decodes:
            at_s, rank = sequence.deadline_s, sequence.slo.rank
            if at_s < due_s[rank]:
                due_s[rank] = at_s
        earliest = [min(due_s[: rank + 1]) for rank in range(NUM_RANKS)]
        limits = [margin * max(0.0, min((at_s - now_s) * 1000, idle_ms)) for at_s in earliest]
        return cls(tuple(limits), earliest[-1] < now_s, max(min(due_s[:FLEX]), due_s[FLEX]) < math.inf)

    @property
    def all_ms(self) -> float:
        """Until anybody needs a token."""
        return self.by_rank[-1]
