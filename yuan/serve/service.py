"""The model in service; versions are swapped without dropping a request."""

from collections.abc import Callable

from yuan.serve.batching import BatchingEngine
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import GenerationRequest, NoModelInService, ServedModel

STARTING_MESSAGE = "the model server is starting; retry in a few seconds"
SHORT_RETRY_AFTER_S = 5


class ModelService:
    """Route requests to the engine in service, and swap models without dropping a request.

    Attributes:
        engine: the engine in service; None before the first model.
        absence_reason: the message for callers while no model is in service, and the seconds after which they may
            retry.
    """

    def __init__(self, metrics: ModelServerMetrics) -> None:
        self.metrics = metrics
        self.engine: BatchingEngine | None = None
        self._draining: list[BatchingEngine] = []
        self.absence_reason: tuple[str, int | None] = (STARTING_MESSAGE, SHORT_RETRY_AFTER_S)

    @property
    def served(self) -> ServedModel | None:
        return self.engine.served if self.engine else None

    def swap_in(self, served: ServedModel) -> None:
        """Put a model into service; the previous engine finishes its requests."""
        previous, self.engine = self.engine, BatchingEngine(served, self.metrics)
        self.metrics.set_version(served.version)
        self._draining = [engine for engine in self._draining if not engine.is_drained]
        if previous is not None:
            previous.drain()
            self._draining.append(previous)

    def fault(self) -> str | None:
        """Describe why requests cannot be answered; None if they can, or if there is no model yet."""
        engines = [*self._draining, self.engine] if self.engine else []
        return next((fault for engine in engines if (fault := engine.fault())), None)

    def submit(self, make_request: Callable[[ServedModel], GenerationRequest]) -> GenerationRequest:
        """Make a request for the model in service and queue it there.

        Raises:
            NoModelInService: if no model is in service.
            EngineStopped: if the engine has stopped.
            QueueFull: if too many sequences wait.
            ValueError: if a prompt does not fit.
        """
        while True:
            engine = self.engine
            if engine is None:
                raise NoModelInService(*self.absence_reason)
            request = make_request(engine.served)
            if engine.submit(request):
                return request
