"""What workers report of their predictions, as Prometheus reads it."""

from __future__ import annotations

from services.api.metrics import Metrics
from shared.messages import WorkerStatus


def test_the_error_of_predictions_is_told_by_worker_while_it_reports() -> None:
    metrics = Metrics()
    worker = WorkerStatus(worker_id="w", latency_error_p50=0.03, latency_error_p95=0.2, latency_exceeded=0.04)
    metrics.set_latency([worker])
    lines = metrics.text().decode().splitlines()
    assert 'flexllm_latency_error_ratio{quantile="0.5",worker="w"} 0.03' in lines
    assert 'flexllm_latency_error_ratio{quantile="0.95",worker="w"} 0.2' in lines
    assert 'flexllm_latency_exceeded_ratio{worker="w"} 0.04' in lines
    metrics.set_latency([])
    assert "flexllm_latency_error_ratio{" not in metrics.text().decode()
