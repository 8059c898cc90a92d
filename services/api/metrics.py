"""Prometheus figures of one process, and of the workers as they report themselves; no label names a tenant."""

from __future__ import annotations

import time
from collections.abc import Iterable

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.api.auth import PUBLIC
from shared.messages import WorkerStatus

log = structlog.get_logger()
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "flexllm_requests", "HTTP requests", ["method", "route", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("flexllm_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.cached_tokens = Counter(
            "flexllm_cached_prompt_tokens",
            "Tokens of prompts found in the prefix cache",
            registry=self.registry,
        )
        self.completion_tokens = Counter(
            "flexllm_completion_tokens", "Tokens generated and delivered", registry=self.registry
        )
        self.inference_requests = Counter(
            "flexllm_inference_requests",
            "Requests for tokens that are over",
            ["tier"],
            registry=self.registry,
        )
        self.first_token_s = Histogram(
            "flexllm_time_to_first_token_seconds",
            "From the request's arrival to its first text",
            ["tier"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.token_s = Histogram(
            "flexllm_time_per_output_token_seconds",
            "Mean over a request's tokens after the first",
            ["tier"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "flexllm_sequences_in_flight", "Sequences enqueued and not over", registry=self.registry
        )

        self.memory_bytes = Gauge(
            "flexllm_memory_bytes",
            "What a worker's tensors hold, on its device or moved to its host's memory",
            ["worker", "place", "owner"],
            registry=self.registry,
        )
        self.memory_limit_bytes = Gauge(
            "flexllm_memory_limit_bytes",
            "All memory of a worker's device",
            ["worker"],
            registry=self.registry,
        )

        self.memory_statistics = Gauge(
            "flexllm_memory_statistics_bytes",
            "Planned for what a worker's device holds, held by tensors; of a GPU's pool allocated, reserved, peak",
            ["worker", "kind"],
            registry=self.registry,
        )

        self.attainment = AttainmentCollector()
        self.registry.register(self.attainment)

        self.latency_error = Gauge(
            "flexllm_latency_error_ratio",
            "How far a worker's last iterations were off what it expected them to take",
            ["worker", "quantile"],
            registry=self.registry,
        )
        self.latency_exceeded = Gauge(
            "flexllm_latency_exceeded_ratio",
            "Share of a worker's last iterations that took longer than planned",
            ["worker"],
            registry=self.registry,
        )

    def set_memory(self, workers: Iterable[WorkerStatus]) -> None:
        """As the workers reported it; of one that reports no more nothing is left."""
        self.memory_bytes.clear()
        self.memory_limit_bytes.clear()
        self.memory_statistics.clear()
        for worker in workers:
            self.memory_limit_bytes.labels(worker.worker_id).set(worker.memory_limit_bytes)
            for kind, num_bytes in worker.memory_statistics.items():
                self.memory_statistics.labels(worker.worker_id, kind).set(num_bytes)
            for place, owners in (("device", worker.memory_bytes), ("host", worker.host_memory_bytes)):
                for owner, num_bytes in owners.items():
                    self.memory_bytes.labels(worker.worker_id, place, owner).set(num_bytes)

    def set_latency(self, workers: Iterable[WorkerStatus]) -> None:
        """As the workers reported it; of one that reports no more nothing is left."""
        self.latency_error.clear()
        self.latency_exceeded.clear()
        for worker in workers:
            self.latency_exceeded.labels(worker.worker_id).set(worker.latency_exceeded)
            self.latency_error.labels(worker.worker_id, "0.5").set(worker.latency_error_p50)
            self.latency_error.labels(worker.worker_id, "0.95").set(worker.latency_error_p95)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class AttainmentCollector(Collector):
    """Counters that workers keep, as they last reported them; of one that reports no more nothing is left."""

    def __init__(self) -> None:
        self.workers: Iterable[WorkerStatus] = ()

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "flexllm_slo_requests",
            "Requests that are over, by whether they met their tier's target",
            labels=["worker", "tier", "target", "outcome"],
        )
        for worker in self.workers:
            for tier, found in worker.service_levels.items():
                for target, met, missed in (
                    ("ttft", found.ttft_met, found.ttft_missed),
                    ("tpot", found.tpot_met, found.tpot_missed),
                ):
                    family.add_metric([worker.worker_id, tier, target, "met"], met)
                    family.add_metric([worker.worker_id, tier, target, "missed"], missed)
        return [family]


class Observation:
    """ASGI: counts every request and logs one line of it: ids, sizes and times, never a prompt or a key."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status, num_bytes = time.monotonic(), 0, 0

        async def observed(message: Message) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            num_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            seconds = round(time.monotonic() - started, 3)
            self._note(scope, status, num_bytes, seconds)

    def _note(self, scope: Scope, status: int, num_bytes: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.requests.labels(known_method(scope["method"]), route, status).inc()
        if route in PUBLIC:  # probes come every few seconds
            return
        owner = scope.get("owner")
        log.info(
            "request",
            method=scope["method"][:16],
            route=route,
            status=status,
            request_id=scope["request_id"],
            tenant=owner.tenant_id if owner else None,
            key=owner.key_id if owner else None,
            size_bytes=num_bytes,
            seconds=seconds,
        )


def known_method(method: str) -> str:
    """Labels are ours: a client cannot make new ones."""
    return method if method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH") else "other"
