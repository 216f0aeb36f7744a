"""Requests of many callers, decoded together: each joins and leaves between two tokens."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from yuan.generate.decoder import Decoder
from yuan.generate.sampling import Chosen, Sampling
from yuan.generate.sequence import Sequence
from yuan.model.transformer import Yuan
from yuan.serve.metrics import Metrics
from yuan.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """Too many requests wait already."""


class Expired(TimeoutError):
    """A request took longer than its limit."""


@dataclass(frozen=True)
class Served:
    """A model in service and its version."""

    model: Yuan
    tokenizer: Tokenizer
    version: int


@dataclass(frozen=True)
class Piece:
    """What one choice of a request gained: text that stays, tokens, and why it ended if it did."""

    index: int
    text: str
    chosen: Many[Chosen]
    finish_reason: str | None


class Request:
    """Prompts of one caller, each answered `num_choices` times with a seed of its own.

    `deliver` is called from the engine's thread with pieces, or once with an error.

    Raises:
        ValueError: if a prompt is empty, has unknown tokens or leaves no room in the window.
    """

    def __init__(
        self,
        served: Served,
        prompts: Many[Many[int]],
        sampling: Sampling,
        deliver: Callable[[Piece | Exception], None],
        limit_s: float,
        num_choices: int = 1,
    ) -> None:
        config = served.model.config
        unknown = [token for prompt in prompts for token in prompt if token >= config.vocab_size]
        if unknown:
            raise ValueError(f"token ids must be below {config.vocab_size}, got {unknown[0]}")
        wishes = [replace(sampling, seed=sampling.seed + choice) for choice in range(num_choices)]
        self.prompts = prompts
        self.sequences = [
            Sequence(prompt, wish, served.tokenizer, config.seq_len) for prompt in prompts for wish in wishes
        ]
        self.served, self.deliver = served, deliver
        self.began = time.monotonic()
        self.deadline = self.began + limit_s
        self.is_over = False
        self._shown = [0] * len(self.sequences)
        self._taken = [0] * len(self.sequences)
        self._ended = [False] * len(self.sequences)

    def cancel(self) -> None:
        """The caller has gone; its rows are free at the next token."""
        self.is_over = True

    def fail(self, error: Exception) -> None:
        """Tell the caller why there is no answer; nothing follows."""
        if not self.is_over:
            self.is_over = True
            self.deliver(error)

    def tell(self) -> None:
        """Deliver what is new since the last time."""
        for index, sequence in enumerate(self.sequences):
            if self._ended[index]:
                continue
            text, ended = sequence.show(), sequence.finish_reason is not None
            chosen = sequence.chosen[self._taken[index] :]
            if ended or len(text) > self._shown[index] or chosen:
                self.deliver(Piece(index, text[self._shown[index] :], chosen, sequence.finish_reason))
            self._shown[index], self._taken[index], self._ended[index] = len(text), len(sequence.chosen), ended
        self.is_over = self.is_over or all(self._ended)


class Engine:
    """One model in service, in a thread of its own, until it is told to finish what it has."""

    def __init__(self, served: Served, metrics: Metrics, *, max_rows: int = 32, max_waiting: int = 256) -> None:
        self.served, self._metrics = served, metrics
        self._max_rows, self._max_waiting = max_rows, max_waiting
        self._decoder = Decoder(served.model)
        self._requests: list[Request] = []
        self._waiting: deque[tuple[Request, Sequence]] = deque()
        self._wake = threading.Condition()
        self._is_draining = False
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"engine-v{served.version}")
        self._thread.start()

    def submit(self, request: Request) -> bool:
        """Queue a request; false if this engine takes none any more, since another version is in service.

        Raises:
            Busy: if too many wait.
        """
        with self._wake:
            if self._is_draining:
                return False
            if len(self._waiting) + len(request.sequences) > self._max_waiting:
                raise Busy(f"{len(self._waiting)} prompts wait already, at most {self._max_waiting}; try again later")
            self._requests.append(request)
            self._waiting += [(request, sequence) for sequence in request.sequences]
            self._wake.notify()
        return True

    def drain(self) -> None:
        """Take nothing new; the thread ends when the last request has its answer."""
        with self._wake:
            self._is_draining = True
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._requests and not self._is_draining:
                    self._wake.wait()
                if not self._requests:
                    log.info("v%d has left service", self.served.version)
                    return
                joining = self._join()
            try:
                self._decode(joining)
            except Exception as error:  # belongs to the callers, who wait for it; the next request starts afresh
                log.exception("decoding failed")
                self._start_afresh(error)
            self._deliver()

    def _join(self) -> list[Sequence]:
        """Waiting sequences for which there are rows; those of callers that have gone leave the queue."""
        joining: list[Sequence] = []
        room = self._max_rows - len(self._decoder.running)
        while self._waiting and len(joining) < room:
            request, sequence = self._waiting.popleft()
            if not request.is_over:
                joining.append(sequence)
        return joining

    def _decode(self, joining: list[Sequence]) -> None:
        """One token for every running sequence, or the first one of those that join."""
        self._metrics.count_tokens(len(joining or self._decoder.running))
        failed = self._decoder.add(joining) if joining else self._decoder.step()
        for sequence, error in failed:
            next(request for request in self._requests if sequence in request.sequences).fail(error)

    def _deliver(self) -> None:
        now = time.monotonic()
        for request in list(self._requests):
            if not request.is_over and now > request.deadline:
                request.fail(
                    Expired(f"no answer within {request.deadline - request.began:.0f} s; ask for fewer tokens")
                )
            if not request.is_over:
                request.tell()
            if request.is_over:
                self._forget(request)
        self._metrics.set_load(len(self._decoder.running), len(self._waiting))

    def _forget(self, request: Request) -> None:
        with self._wake:
            self._requests.remove(request)
        for sequence in request.sequences:
            if sequence in self._decoder.running:
                self._decoder.remove(sequence)

    def _start_afresh(self, error: Exception) -> None:
        self._decoder = Decoder(self.served.model)
        for request in self._requests:
            request.fail(error)


class Service:
    """The engine in service; models are swapped without dropping a request."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self._engine: Engine | None = None

    @property
    def served(self) -> Served | None:
        return self._engine.served if self._engine else None

    def use(self, served: Served) -> None:
        """Put a model into service; the one before finishes what it has."""
        old, self._engine = self._engine, Engine(served, self.metrics)
        self.metrics.set_version(served.version)
        if old is not None:
            old.drain()

    def submit(self, make: Callable[[Served], Request]) -> Request:
        """Make a request for the model in service and queue it there.

        Raises:
            LookupError: if no model is in service.
            Busy: if too many wait.
            ValueError: if a prompt does not fit.
        """
        while True:
            engine = self._engine
            if engine is None:
                raise LookupError("no model is in service yet; promote a version")
            request = make(engine.served)
            if engine.submit(request):
                return request
