"""What Prometheus reads: requests by page and status, and the engine's own numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
COUNTERS = {
    "accepted": "Images that were accepted",
    "refused": "Images that were refused since the queue was full",
    "answered": "Images that were answered",
    "failed": "Images that were answered with an error",
    "batches": "Forward passes",
    "mixed_batches": "Forward passes for several adapters",
    "hits": "Images whose adapter was in memory",
    "misses": "Images whose adapter was not in memory",
    "evictions": "Adapters that made room for others",
    "replacements": "Adapters that were loaded again since their files had changed",
}
GAUGES = {"queue_length": "Images that wait for an answer", "adapters": "Adapters in memory"}


class Metrics:
    """The numbers of one app, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        labels = ("path", "status")
        self.requests = Counter("vpt_peft_http_requests", "Requests that were answered", labels, registry=self.registry)
        self.seconds = Histogram(
            "vpt_peft_http_request_seconds", "Time from a request's headers to its answer", ("path",), buckets=BUCKETS,
            registry=self.registry,
        )  # fmt: skip

    def record(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def render(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """The statistics of an engine at the time when they are read."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """The numbers, see :class:`~vpt_peft.deploy.engine.EngineStats`."""
        stats = self.engine.stats()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"vpt_peft_engine_{name}", text, value=getattr(stats, name))
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"vpt_peft_engine_{name}", text, value=getattr(stats, name))
        sizes = CounterMetricFamily(
            "vpt_peft_engine_batch_size", "Forward passes by number of images", labels=("images",)
        )
        for size, count in stats.batch_sizes.items():
            sizes.add_metric((str(size),), count)
        yield sizes
        latency = GaugeMetricFamily(
            "vpt_peft_engine_latency_seconds", "Time from submission to answer, latest answers", labels=("quantile",)
        )
        for quantile in ("50", "95", "99"):
            seconds = getattr(stats, f"latency_p{quantile}")
            if seconds is not None:
                latency.add_metric((f"0.{quantile}".rstrip("0"),), seconds)
        yield latency


class MeasureRequests:
    """Middleware that counts requests and their time."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the app for a connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:  # paths of unknown pages are not counted one by one: there is no end to them
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.record(path, status, time.perf_counter() - start)
