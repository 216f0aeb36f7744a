"""Fair queue of the sequences that wait for slots of the engine."""

from collections import Counter, deque
from collections.abc import Callable

from yuan.generate.sequence import DecodingSequence
from yuan.serve.request import GenerationRequest, QueueFull


class WaitingQueue:
    """Queue sequences by caller, and share slots so that no caller can occupy all of them.

    The next slot goes to the caller with the fewest slots, round-robin among equals. The last quarter of the slots is
    reserved for callers that have none, so that a new caller gets a slot under any load. Requests without a caller are
    the platform's own: they share slots in the same way, but may fill every slot.

    Args:
        max_slots: slots of the engine.
        max_waiting: limit of waiting sequences. The platform's own may use all of it; one caller may use half of it if
            no other caller waits, a third with one other waiting caller, and so on.
    """

    def __init__(self, max_slots: int, max_waiting: int) -> None:
        self._max_waiting, self._reserve = max_waiting, max_slots // 4
        self._queues: dict[str, deque[tuple[GenerationRequest, DecodingSequence]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, request: GenerationRequest) -> None:
        """Queue all sequences of a request.

        Raises:
            QueueFull: if too many sequences of the caller wait. A caller with none waiting is never refused.
        """
        caller, num_added = request.caller, len(request.sequences)
        if len(self._queues.get(caller, ())) + num_added > self._compute_limit(caller):
            self.drop_finished()
        num_waiting, limit = len(self._queues.get(caller, ())), self._compute_limit(caller)
        if num_waiting + num_added > limit and (num_waiting or not caller):
            subject = "prompts of yours" if caller else "prompts"
            raise QueueFull(f"{num_waiting} {subject} wait already, at most {limit}; try again later")
        self._queues.setdefault(caller, deque()).extend((request, sequence) for sequence in request.sequences)

    def take(
        self,
        num_free: int,
        slots_by_caller: Counter[str],
        admit: Callable[[GenerationRequest, DecodingSequence, bool], bool],
    ) -> None:
        """Take sequences for the free slots, until one is not admitted; drop those of requests that are over.

        A sequence that is not admitted stays the next one, so that small requests do not overtake it without end.

        Args:
            num_free: number of free slots.
            slots_by_caller: number of slots of each caller; the taken slots are added.
            admit: reserves memory for a sequence, and returns false if there is none now; true as its last argument
                leaves a quarter of the memory to callers that have no slot.
        """
        num_taken = 0
        while num_free > num_taken:
            # The reserved slots are for callers that have none, and for the platform itself.
            is_reserved = num_free - num_taken <= self._reserve
            eligible = [caller for caller in self._queues if not (is_reserved and caller and slots_by_caller[caller])]
            if not eligible:
                break

            # The first of the callers with the fewest slots.
            caller = min(eligible, key=lambda caller: slots_by_caller[caller])
            request, sequence = self._queues[caller][0]
            if not request.is_over:
                if not admit(request, sequence, bool(caller and slots_by_caller[caller])):
                    break
                num_taken += 1
                slots_by_caller[caller] += 1
            queue = self._queues.pop(caller)
            queue.popleft()
            if queue:
                self._queues[caller] = queue  # reinserted last: round-robin among callers with equal slots

    def put_first(self, request: GenerationRequest, sequence: DecodingSequence) -> None:
        """Put a sequence before all others of its caller, without a limit: it was taken before."""
        self._queues.setdefault(request.caller, deque()).appendleft((request, sequence))

    def drop_finished(self) -> None:
        """Drop the sequences of requests that are over."""
        for caller, queue in list(self._queues.items()):
            remaining = deque((request, sequence) for request, sequence in queue if not request.is_over)
            if remaining:
                self._queues[caller] = remaining
            else:
                del self._queues[caller]

    def _compute_limit(self, caller: str) -> int:
        if not caller:
            return self._max_waiting
        num_others = sum(1 for name in self._queues if name and name != caller)
        return self._max_waiting // (2 + num_others)
