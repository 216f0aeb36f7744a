"""The model in service, which is swapped without dropping a request."""

from collections.abc import Callable

from yuan.serve.batching import Engine
from yuan.serve.metrics import Metrics
from yuan.serve.request import Request, Served, Unserved

STARTING = "the model server is starting; repeat in a few seconds"
SOON_S = 5


class Service:
    """The engine in service; models are swapped without dropping a request.

    Attributes:
        why_none: what callers are told while no model is in service, and when they may ask again, in seconds.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._engine: Engine | None = None
        self._draining: list[Engine] = []
        self.why_none: tuple[str, int | None] = (STARTING, SOON_S)

    @property
    def served(self) -> Served | None:
        return self._engine.served if self._engine else None

    def use(self, served: Served) -> None:
        """Put a model into service; the one before finishes what it has."""
        old, self._engine = self._engine, Engine(served, self.metrics)
        self.metrics.set_version(served.version)
        self._draining = [engine for engine in self._draining if not engine.has_left]
        if old is not None:
            old.drain()
            self._draining.append(old)

    def fault(self) -> str | None:
        """Say in words why answers cannot be expected; None when they can, or when there is no model yet."""
        engines = [*self._draining, self._engine] if self._engine else []
        return next((fault for engine in engines if (fault := engine.fault())), None)

    def submit(self, make: Callable[[Served], Request]) -> Request:
        """Make a request for the model in service and queue it there.

        Raises:
            Unserved: if no model is in service.
            Broken: if the engine has ended.
            Busy: if too many wait.
            ValueError: if a prompt does not fit.
        """
        while True:
            engine = self._engine
            if engine is None:
                raise Unserved(*self.why_none)
            request = make(engine.served)
            if engine.submit(request):
                return request
