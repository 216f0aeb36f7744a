"""The model in service; versions are swapped without dropping a request."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from yuan.generate.cache_slots import CacheBudget
from yuan.serve.batching import BatchingEngine
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import EngineStopped, GenerationRequest, NoModelInService, ServedModel

SHORT_RETRY_AFTER_S = 5


@dataclass(frozen=True, kw_only=True)
class AbsenceReason:
    """Why no model is in service.

    Attributes:
        message: for callers, with what they can do.
        retry_after_s: seconds after which a retry may succeed; None if waiting does not help.
    """

    message: str
    retry_after_s: int | None


STARTING_REASON = AbsenceReason(
    message="the model server is starting; retry in a few seconds", retry_after_s=SHORT_RETRY_AFTER_S
)


class ModelService:
    """Route requests to the engine in service, and swap models without dropping a request.

    Attributes:
        engine: the engine in service; None before the first model, and after the end of service.
        absence_reason: reported to callers while no model is in service.
        is_stopped: service has ended; no model is put into service any more.
        is_swapping: a model leaves before the next one is loaded, since memory does not hold both; requests wait.
        num_swap_waiters: calls that wait while one model leaves before the next one is loaded.
        problem: why a version cannot be served, for operators; None if there is no such problem.

    Args:
        budget: of the caches of all engines; None for no limit.
    """

    def __init__(self, metrics: ModelServerMetrics, budget: CacheBudget | None = None) -> None:
        self.metrics = metrics
        self._budget = budget or CacheBudget()
        self.engine: BatchingEngine | None = None
        self._draining: list[BatchingEngine] = []
        self._draining_lock = threading.Lock()
        self._change_lock = threading.Lock()  # of the engine in service and the reason for its absence
        self.absence_reason = STARTING_REASON
        self.is_stopped = self.is_swapping = False
        self.num_swap_waiters = 0
        self.problem: str | None = None

    @property
    def is_idle(self) -> bool:
        """Return True if no engine is in service and none finishes its requests."""
        return self.engine is None and all(engine.has_ended for engine in self._list_draining())

    @property
    def served(self) -> ServedModel | None:
        return self.engine.served if self.engine else None

    def swap_in(self, served: ServedModel) -> None:
        """Put a model into service; the previous engine finishes its requests.

        Raises:
            EngineStopped: if service has ended.
        """
        with self._change_lock:
            if self.is_stopped:
                raise EngineStopped("the model server ends its service on these devices")
            previous, self.engine = self.engine, BatchingEngine(served, self.metrics, self._budget)
            self.is_swapping = False
            self.metrics.set_version(served.version)
            self._drain(previous)

    def take_out(self) -> None:
        """Take the model out of service, because memory does not hold the next one beside it; new requests wait.

        Raises:
            EngineStopped: if service has ended.
        """
        with self._change_lock:
            if self.is_stopped:
                raise EngineStopped("the model server ends its service on these devices")
            self.is_swapping = True
            previous, self.engine = self.engine, None
            self._drain(previous)

    def stop(self, reason: AbsenceReason) -> None:
        """End the service: running requests are answered, and new ones are refused with the reason."""
        with self._change_lock:
            self.is_stopped, self.is_swapping, self.absence_reason = True, False, reason
            previous, self.engine = self.engine, None
            self._drain(previous)

    def explain_absence(self, message: str, retry_after_s: int | None) -> None:
        """Set what callers are told while no model is in service; the reason of `stop` is kept."""
        with self._change_lock:
            if not self.is_stopped:
                self.absence_reason = AbsenceReason(message=message, retry_after_s=retry_after_s)

    @property
    def max_cache_bytes(self) -> int | None:
        """Return the budget of the caches of all engines; None for no limit."""
        return self._budget.max_bytes

    def resize_cache(self, max_bytes: int) -> None:
        """Change the budget of the caches; what is in use above a smaller one is freed as requests end."""
        self._budget.max_bytes = max_bytes
        with self._change_lock:
            if self.engine is not None:
                self.engine.follow_budget()

    def _drain(self, engine: BatchingEngine | None) -> None:
        if engine is not None:
            with self._draining_lock:
                self._draining.append(engine)
            engine.drain()

    def _list_draining(self) -> list[BatchingEngine]:
        with self._draining_lock:  # the weights of one that is drained are freed
            self._draining = [engine for engine in self._draining if not engine.is_drained]
            return self._draining

    def fault(self) -> str | None:
        """Describe why requests cannot be answered; None if they can, or if there is no model yet."""
        engine = self.engine
        engines = [*self._list_draining(), *([engine] if engine else [])]
        return next((fault for engine in engines if (fault := engine.fault())), None)

    def get_served(self) -> ServedModel:
        """Return the model in service.

        Raises:
            NoModelInService: if there is none.
        """
        if self.engine is None:
            raise NoModelInService(self.absence_reason.message, self.absence_reason.retry_after_s)
        return self.engine.served

    def submit(self, make_request: Callable[[ServedModel], GenerationRequest]) -> GenerationRequest:
        """Make a request for the model in service and queue it there.

        Raises:
            NoModelInService: if no model is in service.
            ModelNotServed: if the request asks for another model.
            EngineStopped: if the engine has stopped.
            QueueFull: if too many sequences wait.
            ValueError: if a prompt does not fit.
        """
        while True:
            engine = self.engine
            if engine is None:
                raise NoModelInService(self.absence_reason.message, self.absence_reason.retry_after_s)
            request = make_request(engine.served)
            if engine.submit(request):
                return request
