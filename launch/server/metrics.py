"""Prometheus metrics of the engine and of requests."""

from collections.abc import Iterator

import prometheus_client
from prometheus_client import core
from prometheus_client import registry

from molmo2_jax.serving import engine as engine_lib

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

# Fields of engine.Totals, and what they count.
_TOTALS = {
    "answered": "Requests that were answered", "cancelled": "Requests whose client hung up",
    "late": "Requests that ran out of time", "failed": "Requests that failed",
    "refused": "Requests refused because the queue was full", "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that were not computed again", "new_tokens": "Tokens generated",
    "steps": "Calls of the decoding program", "prefill_seconds": "Seconds of prefill",
    "decode_seconds": "Seconds of decoding"}


class _OfEngine(registry.Collector):
    def __init__(self, engine: engine_lib.Engine):
        self._engine = engine

    def collect(self) -> Iterator[core.Metric]:
        engine, roots = self._engine, self._engine.roots
        counters = [(f"molmo2_{name}", what, getattr(engine.totals, name)) for name, what in _TOTALS.items()]
        counters += [("molmo2_compilations", "Programs compiled since requests are taken",
                      engine.compilations),
                     ("molmo2_root_hits", "Roots found in the cache", roots.hits),
                     ("molmo2_root_misses", "Roots looked for in vain", roots.misses),
                     ("molmo2_root_evictions", "Roots that left the cache", roots.evictions)]
        gauges = [("molmo2_rows", "Decode rows", engine.num_rows),
                  ("molmo2_rows_busy", "Decode rows in use", engine.num_busy),
                  ("molmo2_requests_waiting", "Requests that wait for a row", engine.num_waiting),
                  ("molmo2_roots", "Roots in the cache", len(roots)),
                  ("molmo2_root_bytes", "Bytes of the roots in the cache", roots.size),
                  ("molmo2_root_bytes_limit", "Most bytes of roots", roots.most_bytes)]
        for name, what, value in counters:
            yield core.CounterMetricFamily(name, what, value=value)
        for name, what, value in gauges:
            yield core.GaugeMetricFamily(name, what, value=value)


class Metrics:
    """Counts requests, and writes all metrics as text."""

    def __init__(self, engine: engine_lib.Engine):
        self._registry = registry.CollectorRegistry()
        self._registry.register(_OfEngine(engine))
        self._statuses = prometheus_client.Counter(
            "molmo2_responses", "Responses by route and status", ["route", "status"], registry=self._registry)
        histogram = lambda name, what: prometheus_client.Histogram(name, what, buckets=_SECONDS,
                                                                   registry=self._registry)
        self.first_token = histogram("molmo2_time_to_first_token_seconds",
                                     "From the request to its first token")
        self.whole = histogram("molmo2_request_seconds", "From the request to the end of its answer")
        self.reading = histogram("molmo2_media_seconds", "Seconds to read media")

    def count(self, route: str, status: int) -> None:
        self._statuses.labels(route, str(status)).inc()

    def text(self) -> bytes:
        return prometheus_client.generate_latest(self._registry)
