"""Service levels kept and missed: how long requests took to their first token and between tokens, by tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.gpu_worker.engine.sequence import Sequence
from services.gpu_worker.engine.slo import SLO


@dataclass(slots=True)
class TierCounts:
    """Of the requests of one tier that are over, since the engine's start; sums in milliseconds."""

    slo: SLO
    ttft_met: int = 0
    ttft_missed: int = 0
    ttft_ms_sum: float = 0.0
    tpot_met: int = 0
    tpot_missed: int = 0
    tpot_ms_sum: float = 0.0

    def add_ttft(self, ttft_ms: float) -> None:
        met = ttft_ms <= self.slo.ttft_ms
        self.ttft_met += met
        self.ttft_missed += not met
        self.ttft_ms_sum += ttft_ms

    def add_tpot(self, tpot_ms: float) -> None:
        met = tpot_ms <= self.slo.tpot_ms
        self.tpot_met += met
        self.tpot_missed += not met
        self.tpot_ms_sum += tpot_ms


class Attainment:
    def __init__(self, slos: Mapping[str, SLO]) -> None:
        self.tiers = {tier: TierCounts(slo) for tier, slo in slos.items()}

    def finish(self, sequence: Sequence, now_s: float) -> None:
        """Judges a request that has its whole answer; one without a token waited until now for that."""
        counts = self.tiers[sequence.tier]
        ttft_ms, tpot_ms = time_to_first_token_ms(sequence, now_s), time_per_output_token_ms(sequence)
        if ttft_ms is not None:
            counts.add_ttft(ttft_ms)
        if tpot_ms is not None:
            counts.add_tpot(tpot_ms)

    def abort(self, sequence: Sequence, now_s: float) -> None:
        """Judges a request that ended early by what it got.

        Nothing is known of one that left before its first token was due: it is not counted.
        """
        if sequence.last_token_s is not None or now_s > sequence.first_deadline_s:
            self.finish(sequence, now_s)


def time_to_first_token_ms(sequence: Sequence, now_s: float) -> float | None:
    """Until now where there is no token. None for a request that has its first token from an earlier worker."""
    if sequence.num_resumed_tokens:
        return None
    first_s = now_s if sequence.first_token_s is None else sequence.first_token_s
    return (first_s - sequence.arrival_s) * 1000


def time_per_output_token_ms(sequence: Sequence) -> float | None:
    """Mean gap between the tokens generated here; None where there is no gap."""
    num_gaps = sequence.num_output_tokens - sequence.num_resumed_tokens - 1
    if sequence.first_token_s is None or sequence.last_token_s is None or num_gaps < 1:
        return None
    return (sequence.last_token_s - sequence.first_token_s) * 1000 / num_gaps
