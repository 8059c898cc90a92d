"""The requests in an engine's hands: checked on their way in, their adapters pinned until they leave."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from services.gpu_worker.engine.sequence import Sampling, Sequence
from services.gpu_worker.engine.slo import SLO
from services.gpu_worker.model.adapter_pool import AdapterPool
from services.gpu_worker.model.transformer import VIRTUAL_TOKEN


class InvalidRequest(ValueError):
    """A request that the engine cannot serve; nobody else is affected."""


class Requests:
    def __init__(
        self, slos: Mapping[str, SLO], adapters: AdapterPool, vocab_size: int, max_model_len: int
    ) -> None:
        self._slos, self._adapters = slos, adapters
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._sequences: dict[str, Sequence] = {}

    def take(
        self,
        request_id: str,
        prompt: list[int],
        sampling: Sampling,
        emitted: list[int],
        adapter: str | None,
        cache_salt: str,
        tier: str,
        arrival_s: float,
    ) -> Sequence:
        """As `Engine.add`."""
        if tier not in self._slos:
            raise InvalidRequest(f"tier {tier!r} is none of {sorted(self._slos)}")
        self._check(request_id, prompt, emitted, sampling, adapter)
        virtual = self._num_virtual_tokens(adapter)
        if adapter is not None:
            self._adapters.pin(adapter)
        sequence = self._sequences[request_id] = Sequence(
            request_id,
            [VIRTUAL_TOKEN] * virtual + prompt + emitted,
            virtual + len(prompt),
            sampling,
            adapter,
            _cache_seed(adapter, cache_salt),
            tier,
            self._slos[tier],
            virtual,
            num_resumed_tokens=len(emitted),
            arrival_s=arrival_s,
        )
        return sequence

    def find(self, request_id: str) -> Sequence | None:
        return self._sequences.get(request_id)

    def release(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        if sequence.adapter is not None:
            self._adapters.unpin(sequence.adapter)

    def _check(
        self, request_id: str, prompt: list[int], emitted: list[int], sampling: Sampling, adapter: str | None
    ) -> None:
        vocab = self._vocab_size
        if request_id in self._sequences:
            raise InvalidRequest(f"request {request_id} is already running")
        if not prompt or min(prompt + emitted) < 0 or max(prompt + emitted) >= vocab:
            raise InvalidRequest(f"the prompt needs at least one token, each in [0, {vocab})")
        problem = sampling.find_problem(vocab)
        if problem is not None:
            raise InvalidRequest(problem)
        if emitted and len(emitted) >= sampling.max_tokens:
            raise InvalidRequest(f"all {sampling.max_tokens} tokens have been generated already")
        if adapter is not None and adapter not in self._adapters:
            raise InvalidRequest(f"adapter {adapter} is not loaded")
        virtual = self._num_virtual_tokens(adapter)
        if virtual + len(prompt) + sampling.max_tokens > self._max_model_len:
            learned = f", {virtual} of the adapter" if virtual else ""
            raise InvalidRequest(
                f"{len(prompt)} prompt tokens{learned} and {sampling.max_tokens} to generate exceed "
                f"{self._max_model_len}"
            )

    def _num_virtual_tokens(self, adapter: str | None) -> int:
        return 0 if adapter is None else self._adapters.get(adapter).num_virtual_tokens


def _cache_seed(adapter: str | None, salt: str) -> bytes:
    """Keys and values depend on the adapter version; the salt keeps tenants apart."""
    return hashlib.blake2b(f"{adapter}|{salt}".encode(), digest_size=32).digest()
