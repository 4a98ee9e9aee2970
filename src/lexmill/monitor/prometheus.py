"""The numbers a server shows at `/metrics`, in the text format of Prometheus."""

from __future__ import annotations

from lexmill.errors import MissingExtra


class ServingMetrics:
    """Counters and gauges of one app, in a registry of its own so that two apps in one process stay apart.

    Raises `MissingExtra` without the extra `serve`. Safe to call from several threads.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ModuleNotFoundError as error:
            raise MissingExtra("serve", "the metrics of a server") from error
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("lexmill_requests", "Requests answered.", ["route", "status"], registry=registry)
        self._latency = Histogram(
            "lexmill_request_seconds",
            "Time from the arrival of a request to its answer.",
            ["route"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=registry,
        )
        self._batch = Histogram(
            "lexmill_batch_size",
            "Items run together.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=registry,
        )
        self._queue = Gauge("lexmill_queue_depth", "Items waiting to be run.", registry=registry)
        self._tokens = Counter("lexmill_tokens", "Real tokens run.", registry=registry)
        self._positions = Gauge(
            "lexmill_positions_per_token",
            "Positions computed per real token in the last batch; 1 where no pad token is computed.",
            registry=registry,
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request. `route` is the pattern (`/v1/classify`), never the path that was asked for."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def batch(self, items: int, tokens: int, positions: int) -> None:
        """Count a batch that was run.

        Args:
            items: requests in it.
            tokens: real tokens in it.
            positions: token positions computed for it, fillers included.
        """
        self._batch.observe(items)
        self._tokens.inc(tokens)
        if tokens:
            self._positions.set(positions / tokens)

    def queue(self, depth: int) -> None:
        """Set how many items wait."""
        self._queue.set(depth)

    def render(self) -> tuple[bytes, str]:
        """The body and the content type of an answer at `/metrics`."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
