"""Whose finetuning is computed next: deficit round robin (Shreedhar and Varghese, 1995) over tenants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class _Account:
    weight: float
    deficit: float = 0.0  # tokens that it may still have in this round


class FairShare:
    """Keys take turns; a turn is worth `quantum` tokens times the weight. Whoever gets tokens out of turn, of
    what the one whose turn it is cannot use, has them deducted from the next ones."""

    def __init__(self, quantum: float) -> None:
        self._quantum = quantum
        self._accounts: dict[str, _Account] = {}  # in the order of the round
        self._turn = ""

    def order(self, weights: Mapping[str, float]) -> list[str]:
        """Of the keys that have work: whose turn it is, then the others, who is owed most first.

        Who has no work has no account: nothing is saved up, and nothing owed.
        """
        self._accounts = {key: own for key, own in self._accounts.items() if key in weights}
        for key, weight in weights.items():
            self._accounts.setdefault(key, _Account(weight)).weight = weight
        keys = list(self._accounts)
        if not keys:
            return []
        if self._turn not in self._accounts:
            self._begin_turn(keys[0])
        while self._accounts[self._turn].deficit <= 0:
            self._begin_turn(keys[(keys.index(self._turn) + 1) % len(keys)])
        others = (key for key in keys if key != self._turn)
        return [self._turn, *sorted(others, key=self._owed, reverse=True)]

    def _owed(self, key: str) -> float:
        return self._accounts[key].deficit / self._accounts[key].weight

    def charge(self, key: str, num_tokens: float) -> None:
        self._accounts[key].deficit -= num_tokens

    def end_turn(self) -> None:
        """Of one who had something to compute but no memory for it: what is left of the turn is lost."""
        self._accounts[self._turn].deficit = min(0.0, self._accounts[self._turn].deficit)

    def _begin_turn(self, key: str) -> None:
        self._turn = key
        self._accounts[key].deficit += self._quantum * self._accounts[key].weight
