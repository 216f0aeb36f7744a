"""The model in service, which is swapped without dropping a request."""

from collections.abc import Callable

from yuan.serve.batching import BatchingEngine
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import GenerationRequest, NoModelInService, ServedModel

STARTING_MESSAGE = "the model server is starting; repeat in a few seconds"
SHORT_RETRY_AFTER_S = 5


class ModelService:
    """The engine in service; models are swapped without dropping a request.

    Attributes:
        why_none: what callers are told while no model is in service, and when they may ask again, in seconds.
    """

    def __init__(self, metrics: ModelServerMetrics) -> None:
        self.metrics = metrics
        self._engine: BatchingEngine | None = None
        self._draining: list[BatchingEngine] = []
        self.absence_reason: tuple[str, int | None] = (STARTING_MESSAGE, SHORT_RETRY_AFTER_S)

    @property
    def served(self) -> ServedModel | None:
        return self._engine.served if self._engine else None

    def swap_in(self, served: ServedModel) -> None:
        """Put a model into service; the one before finishes what it has."""
        old, self._engine = self._engine, BatchingEngine(served, self.metrics)
        self.metrics.set_version(served.version)
        self._draining = [engine for engine in self._draining if not engine.is_drained]
        if old is not None:
            old.drain()
            self._draining.append(old)

    def fault(self) -> str | None:
        """Say in words why answers cannot be expected; None when they can, or when there is no model yet."""
        engines = [*self._draining, self._engine] if self._engine else []
        return next((fault for engine in engines if (fault := engine.fault())), None)

    def submit(self, make: Callable[[ServedModel], GenerationRequest]) -> GenerationRequest:
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
                raise NoModelInService(*self.absence_reason)
            request = make(engine.served)
            if engine.submit(request):
                return request
