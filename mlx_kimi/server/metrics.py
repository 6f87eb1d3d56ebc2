"""/metrics, for Prometheus. Tokens are the sums of the usages that requests were answered with."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_kimi.server.engine import Engine
from mlx_kimi.server.record import Record

PREFIX = "mlx_kimi_"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counts of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine))
        self._requests = self._counter("requests", "Requests answered.", "route", "status")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("cached_tokens", "Of these, read before.")
        self._completion = self._counter("completion_tokens", "Tokens of answers.")
        self._seconds = self._histogram("request_seconds", "From a request to its end.", "route")
        self._first = self._histogram("first_token_seconds", "From a request to the first token.")

    def add(self, record: Record) -> None:
        """Count a request that is over."""
        self._requests.labels(record.route, str(record.status)).inc()
        self._seconds.labels(record.route).observe(record.seconds)
        self._prompt.inc(record.usage.prompt_tokens)
        self._cached.inc(record.usage.cached_tokens)
        self._completion.inc(record.usage.completion_tokens)
        if record.first_token_seconds is not None:
            self._first.observe(record.first_token_seconds)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, *labels: str) -> Histogram:
        return Histogram(PREFIX + name, help, labels, buckets=SECONDS, registry=self.registry)


class _OfEngine(Collector):
    """What the engine says of itself when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        status = self._engine.status()
        gauges = {
            "queued_requests": ("Requests that wait.", status.queued),
            "reading_requests": ("Requests whose prompts are being read.", status.reading),
            "decoding_requests": ("Requests that are being answered.", status.decoding),
            "prefill_slice_tokens": ("Prompt tokens read in one slice.", status.prefill_slice),
            "tree_states": ("States in the prefix tree.", status.tree_states),
            "tree_bytes": ("Bytes of the prefix tree.", status.tree_bytes),
            "tree_memory_bytes": ("Bytes that it may take.", status.tree_memory),
            "disk_bytes": ("Bytes of the states that are stored.", status.disk_bytes),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, help, value=value)
        counters = {
            "engine_read_tokens": ("Prompt tokens read.", status.counters.read_tokens),
            "engine_generated_tokens": ("Tokens drawn.", status.counters.generated_tokens),
            "engine_drafted_tokens": ("Tokens guessed.", status.counters.drafted_tokens),
            "engine_accepted_tokens": ("Of these, drawn.", status.counters.accepted_tokens),
            "engine_refused": ("Requests that were not queued.", status.counters.refused),
            "engine_cancelled": ("Answers that were cancelled.", status.counters.cancelled),
            "engine_failed": ("Answers that failed.", status.counters.failed),
            "tree_evicted": ("States given up for memory.", status.counters.evicted),
        }
        for name, (help, value) in counters.items():
            yield CounterMetricFamily(PREFIX + name, help, value=value)
