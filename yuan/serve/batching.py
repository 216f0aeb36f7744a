"""Continuous batching: requests of many callers are decoded together and join or leave between two tokens."""

import logging
import threading
import time
from collections import Counter

from yuan.device_faults import describes_lost_device
from yuan.generate.cache_slots import CacheBudget, CacheBudgetExceeded
from yuan.generate.decoder import NoCacheRoom, NonFiniteLogits, check_decoding
from yuan.generate.pipelined_decoder import make_decoder
from yuan.generate.sequence import DecodingSequence
from yuan.model.accelerator import release_unused_memory
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.request import AnswerTimeout, DecodingFailed, EngineStopped, GenerationRequest, ServedModel
from yuan.serve.waiting import WaitingQueue

log = logging.getLogger(__name__)

RESERVED_CACHE_SHARE = 0.25  # for callers that have no slot
ROOM_POLL_S = 0.01
MAX_DECODING_FAULT_CHARACTERS = 300
ENGINE_STALL_TIMEOUT_S = 300.0  # longer than any request may take, so that a slow machine does not count as stalled


class BatchingEngine:
    """Run one model in its own thread until it is drained.

    If a forward pass raises, only the requests whose own sequences cause the error fail: the decoder is rebuilt, and
    the sequences of each request are added to it separately. If a delivery raises, only its request fails. Every error
    is counted in the metrics.

    A sequence enters when the budget of the cache has room for its prompt and its longest answer. Each one takes one of
    `max_slots` slots; slots are shared fairly among callers; see `WaitingQueue`.

    Args:
        budget: of the cache, shared with the engines of other versions; None for no limit.
    """

    def __init__(
        self,
        served: ServedModel,
        metrics: ModelServerMetrics,
        budget: CacheBudget | None = None,
        *,
        max_slots: int = 32,
        max_waiting: int = 256,
    ) -> None:
        self.served, self._metrics = served, metrics
        self._max_slots, self._waiting = max_slots, WaitingQueue(max_slots, max_waiting)
        self._budget = budget or CacheBudget()
        self._cache_user = self._budget.add_user(self.follow_budget)
        self._decoder = make_decoder(served.model, self._budget)
        self._requests: list[GenerationRequest] = []
        self._wake = threading.Condition()
        self._is_draining = self._has_crashed = self._is_recovering = self._lacks_room = False
        self._needs_probe = False
        self._fault: str | None = None
        self._progress_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"engine-v{served.version}")
        self._thread.start()

    @property
    def is_drained(self) -> bool:
        """Return True if the engine was drained and its thread has ended."""
        return self.has_ended and not self._has_crashed

    @property
    def has_ended(self) -> bool:
        """Return True if the engine's thread has ended, so that it uses no device."""
        return not self._thread.is_alive()

    def fault(self) -> str | None:
        """Describe why this engine cannot answer; None if it can.

        It can if it made progress within ENGINE_STALL_TIMEOUT_S, or is idle and its thread is alive.
        """
        silent_s = time.monotonic() - self._progress_at
        if self.is_drained:
            return None
        if self._fault is None and self._requests and silent_s > ENGINE_STALL_TIMEOUT_S:
            return f"requests wait, and no token was computed for {silent_s:.0f} s"
        return self._fault

    def submit(self, request: GenerationRequest) -> bool:
        """Queue a request; return false if this engine is draining, because another version is in service.

        Raises:
            CacheBudgetExceeded: if a sequence needs more than the whole cache.
            EngineStopped: if the engine's thread has ended.
            QueueFull: if too many sequences of the caller wait.
        """
        for sequence in request.sequences:
            self._decoder.check_fits(sequence.max_tokens)
        with self._wake:
            if self._is_draining:
                return False
            if self._has_crashed:
                raise EngineStopped("the engine has stopped and will be restarted; try again in a minute")
            self._waiting.add(request)
            if not self._requests:
                self._progress_at = time.monotonic()
            self._requests.append(request)
            self._wake.notify()
        return True

    def drain(self) -> None:
        """Accept no new requests; the thread ends after the last request is answered."""
        with self._wake:
            self._is_draining = True
            self._wake.notify()

    def follow_budget(self) -> None:
        """Free what a smaller budget no longer allows, or another engine needs, as soon as nothing uses it."""
        with self._wake:
            self._wake.notify()

    def _release_excess(self) -> None:
        max_bytes, num_bytes = self._budget.max_bytes, self._budget.num_bytes
        is_within = max_bytes is None or num_bytes <= max_bytes
        if is_within and not self._budget.is_needed_by_others(self._cache_user):
            return
        self._decoder.release_empty_blocks()
        if self._budget.num_bytes < num_bytes:  # it waits for the device
            release_unused_memory()

    def _run(self) -> None:
        try:
            self._run_passes()
        except BaseException as error:  # no known error arrives here; if one does, fail all requests that wait
            log.critical("the engine of v%d has ended", self.served.version, exc_info=True)
            self._metrics.count_error("thread")
            with self._wake:
                self._has_crashed, self._fault = True, f"the engine's thread has ended ({type(error).__name__})"
            for request in self._requests:
                self._fail_request(request, EngineStopped("the engine has stopped; try again in a minute"))
        finally:
            self._budget.remove_user(self._cache_user)
            try:
                self._decoder.discard()  # the next engine shares the budget
            except Exception:
                log.warning("the cache of v%d cannot be freed", self.served.version, exc_info=True)

    def _run_passes(self) -> None:
        while True:
            with self._wake:
                while not self._requests and not self._is_draining:
                    self._release_excess()
                    self._wake.wait()
                if not self._requests:
                    log.info("v%d has stopped serving", self.served.version)
                    return
            self._run_pass()

    def _run_pass(self) -> None:
        """Admit sequences that wait, run a pass over prompts and one over the other sequences; then deliver."""
        num_tokens, self._lacks_room = self._decoder.num_chosen_tokens, False
        try:
            if not self._is_recovering:
                self._admit_waiting()
            for failure in self._decoder.step():
                self._fail_sequence(failure.sequence, failure.error)
            num_new_tokens = self._decoder.num_chosen_tokens - num_tokens
            self._metrics.count_tokens(num_new_tokens)
            if self._decoder.has_passed:
                self._is_recovering = False
            if num_new_tokens:  # a step without a pass shows nothing
                self._fault = None
        except Exception as error:
            self._recover(error)
        if self._needs_probe:
            self._probe_decoding()
        try:
            self._deliver()
            if not self._requests:
                self._decoder.settle()
            self._progress_at = time.monotonic()
        except Exception as error:
            self._recover(error)
        self._lacks_room = self._lacks_room and bool(self._waiting)  # none if all that waited are over
        self._budget.report_need(self._cache_user, lacks_room=self._lacks_room)
        if self._is_draining:
            self._decoder.release_empty_blocks()
        self._release_excess()
        if self._lacks_room and not self._decoder.running:  # another engine has the bytes
            with self._wake:
                self._wake.wait(ROOM_POLL_S)

    def _admit_waiting(self) -> None:
        """Admit waiting sequences to the free slots, as the cache has room for them."""
        num_free = self._max_slots - len(self._decoder.running)
        if not self._waiting or num_free <= 0:
            return
        if self._budget.is_needed_before(self._cache_user):  # by the version that this one replaces
            self._lacks_room = True
            return
        slots_by_caller = self._count_slots_by_caller()
        with self._wake:
            self._waiting.take(num_free, slots_by_caller, self._admit)

    def _admit(self, request: GenerationRequest, sequence: DecodingSequence, leaves_reserve: bool) -> bool:
        """Reserve a slot of the cache; a request for which there can be none is admitted and fails."""
        leaves_reserve = leaves_reserve and not self._is_draining  # no other caller comes
        try:
            is_admitted = self._decoder.admit(sequence, RESERVED_CACHE_SHARE if leaves_reserve else 0.0)
        except CacheBudgetExceeded as error:  # the budget has become smaller since the request was queued
            self._fail_request(request, error)
            return True
        except Exception as error:
            self._needs_probe = True  # clearing a slot is the first use of a device that is lost
            log.error("no slot can be reserved", exc_info=error)
            self._metrics.count_error("decode")
            self._fail_request(request, DecodingFailed())
            return True
        self._lacks_room = self._lacks_room or not is_admitted
        return is_admitted

    def _count_slots_by_caller(self) -> Counter[str]:
        running = {id(sequence) for sequence in self._decoder.running}
        slots_by_caller: Counter[str] = Counter()
        for request in self._requests:
            slots_by_caller[request.caller] += sum(id(sequence) in running for sequence in request.sequences)
        return slots_by_caller

    def _find_request(self, sequence: DecodingSequence) -> GenerationRequest | None:
        return next((request for request in self._requests if sequence in request.sequences), None)

    def _fail_sequence(self, sequence: DecodingSequence, error: Exception) -> None:
        """Fail the request of one sequence whose token could not be added; other sequences are not affected."""
        self._metrics.count_error("decode")
        if isinstance(error, NonFiniteLogits):
            log.error("v%d: %s", self.served.version, error)
        else:
            log.error("a token could not be added", exc_info=error)
            error = DecodingFailed()
        if (owner := self._find_request(sequence)) is not None:
            self._fail_request(owner, error)

    def _recover(self, error: Exception) -> None:
        """Rebuild the decoder after an error, and add the sequences of each request to it separately.

        Requests whose sequences raise again fail. If the next pass, which admits no new sequences, also raises, all
        requests with running sequences fail, since the error cannot be attributed to one.
        """
        log.error("decoding failed", exc_info=error)
        self._metrics.count_error("decode")
        sequences = [sequence for sequence in self._decoder.running if sequence.finish_reason is None]
        self._decoder.discard()  # the new decoder needs the bytes
        self._decoder = make_decoder(self.served.model, self._budget)
        for request in list(self._requests):
            running = [sequence for sequence in sequences if sequence in request.sequences]
            if running and self._is_recovering:
                self._fail_request(request, DecodingFailed())
            elif running and not request.is_over:
                self._rejoin(request, running)
        self._is_recovering = bool(self._decoder.running)
        self._probe_decoding()

    def _rejoin(self, request: GenerationRequest, sequences: list[DecodingSequence]) -> None:
        try:
            for failure in self._decoder.add(sequences):
                if isinstance(failure.error, NoCacheRoom):
                    with self._wake:
                        self._waiting.put_first(request, failure.sequence)
                else:
                    self._fail_sequence(failure.sequence, failure.error)
        except Exception as error:
            log.warning("a request cannot be decoded (%s)", type(error).__name__)
            self._fail_request(request, DecodingFailed())

    def _probe_decoding(self) -> None:
        """Decode one token, to detect a process that can no longer decode; a restart may fix that."""
        self._needs_probe = False
        try:
            check_decoding(self.served.model, self.served.tokenizer)
            self._fault = None
        except Exception as error:
            log.exception("a single token cannot be decoded either")
            is_device_lost = describes_lost_device(str(error))  # its text has nothing of a request then
            reason = str(error)[:MAX_DECODING_FAULT_CHARACTERS] if is_device_lost else type(error).__name__
            self._fault = f"the model cannot be decoded ({reason})"

    def _deliver(self) -> None:
        now, is_any_over = time.monotonic(), False
        for request in list(self._requests):
            if not request.is_over and now > request.deadline_s:
                limit_s = request.deadline_s - request.start_s
                log.warning("v%d did not answer a request within %.0f s", self.served.version, limit_s)
                self._fail_request(request, AnswerTimeout(f"no answer within {limit_s:.0f} s; ask for fewer tokens"))
            if not request.is_over:
                self._deliver_request(request)
            if request.is_over:
                self._remove_request(request)
                is_any_over = True
        if is_any_over:
            with self._wake:
                self._waiting.drop_finished()
        self._metrics.set_load(len(self._decoder.running), len(self._waiting))
        self._metrics.set_cache(self._budget.num_bytes, self._budget.max_bytes)

    def _deliver_request(self, request: GenerationRequest) -> None:
        try:
            request.deliver_new()
        except Exception as error:  # for example, the caller's event loop has closed
            log.error("an answer cannot be delivered", exc_info=error)
            self._metrics.count_error("deliver")
            self._fail_request(request, error)

    def _fail_request(self, request: GenerationRequest, error: Exception) -> None:
        try:
            request.fail(error)
        except Exception:
            log.warning("cannot report to a caller that its request failed", exc_info=True)
            self._metrics.count_error("deliver")

    def _remove_request(self, request: GenerationRequest) -> None:
        """Free the slots of a request that is over."""
        with self._wake:
            self._requests.remove(request)
        for sequence in request.sequences:
            if sequence in self._decoder.running:
                self._decoder.remove(sequence)
