"""Prometheus metrics of the model server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
REQUEST_BUCKETS_S = (0.1, 0.3, 1, 3, 10, 30, 100)


class ModelServerMetrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "yuan_requests", "requests by route and status", ["route", "status"], registry=self._registry
        )
        self._errors = Counter(
            "yuan_engine_errors", "errors in decoding and delivering, by place", ["place"], registry=self._registry
        )
        for place in ("decode", "deliver", "thread"):
            self._errors.labels(place)
        self._tokens = Counter("yuan_tokens", "tokens decoded", registry=self._registry)
        self._running = Gauge("yuan_running", "sequences being decoded", registry=self._registry)
        self._waiting = Gauge("yuan_waiting", "sequences that wait", registry=self._registry)
        self._cache_bytes = Gauge("yuan_cache_bytes", "memory of the decoding cache", registry=self._registry)
        self._max_cache_bytes = Gauge(
            "yuan_max_cache_bytes", "budget of the decoding cache; 0 for none", registry=self._registry
        )
        self._calls = Gauge("yuan_calls", "calls whose answer has not ended", registry=self._registry)
        self._version = Gauge("yuan_version", "version in service", registry=self._registry)
        self._first_token_seconds = Histogram(
            "yuan_first_token_seconds",
            "from request to first token",
            registry=self._registry,
            buckets=FIRST_TOKEN_BUCKETS_S,
        )
        self._request_seconds = Histogram(
            "yuan_request_seconds", "from request to last token", registry=self._registry, buckets=REQUEST_BUCKETS_S
        )

    def count_request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def count_error(self, place: str) -> None:
        self._errors.labels(place).inc()

    def count_tokens(self, number: int) -> None:
        self._tokens.inc(number)

    def set_load(self, running: int, waiting: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)

    def set_cache(self, num_bytes: int, max_bytes: int | None) -> None:
        self._cache_bytes.set(num_bytes)
        self._max_cache_bytes.set(max_bytes or 0)

    def change_open_calls(self, change: int) -> None:
        self._calls.inc(change)

    def set_version(self, version: int) -> None:
        self._version.set(version)

    def observe_first_token(self, seconds: float) -> None:
        self._first_token_seconds.observe(seconds)

    def observe_request(self, seconds: float) -> None:
        self._request_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        return generate_latest(self._registry)
