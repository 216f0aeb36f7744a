"""Sequences that wait for rows of the engine, and whose turn is next."""

from collections import Counter, deque

from yuan.generate.sequence import DecodingSequence
from yuan.serve.request import GenerationRequest, QueueFull


class WaitingQueue:
    """A queue for each caller, from which rows are filled so that nobody can take them all.

    The next row goes to the caller that has the fewest, in turn among equals. The last quarter of the rows is kept for
    callers that have none, so that one who comes late finds a row however many others ask for much. Requests without a
    caller are the platform's own: they take part, and may fill every row.

    Args:
        max_rows: rows of the engine.
        max_waiting: sequences of one caller that may wait while nobody else does are half of this, with one other
            waiting caller a third, and so on; of the platform's own, all of it.
    """

    def __init__(self, max_rows: int, max_waiting: int) -> None:
        self._max_waiting, self._reserve = max_waiting, max_rows // 4
        self._queues: dict[str, deque[tuple[GenerationRequest, DecodingSequence]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, request: GenerationRequest) -> None:
        """Queue all sequences of a request.

        Raises:
            Busy: if too many of its caller wait. A caller of whom none waits is never refused.
        """
        caller, added = request.caller, len(request.sequences)
        if len(self._queues.get(caller, ())) + added > self._compute_limit(caller):
            self.drop_finished()
        own, limit = len(self._queues.get(caller, ())), self._compute_limit(caller)
        if own + added > limit and (own or not caller):
            whose = "prompts of yours" if caller else "prompts"
            raise QueueFull(f"{own} {whose} wait already, at most {limit}; try again later")
        self._queues.setdefault(caller, deque()).extend((request, sequence) for sequence in request.sequences)

    def take(self, free: int, rows: Counter[str]) -> list[DecodingSequence]:
        """Take sequences for free rows; those of requests that are over leave the queue.

        Args:
            free: rows that nobody has.
            rows: rows that each caller has; those taken are added.
        """
        taken: list[DecodingSequence] = []
        while free > len(taken):
            is_reserved = free - len(taken) <= self._reserve
            turn = [caller for caller in self._queues if not (is_reserved and caller and rows[caller])]
            if not turn:
                break
            caller = min(turn, key=lambda caller: rows[caller])
            queue = self._queues.pop(caller)
            request, sequence = queue.popleft()
            if not request.is_over:
                taken.append(sequence)
                rows[caller] += 1
            if queue:
                self._queues[caller] = queue  # behind its equals
        return taken

    def drop_finished(self) -> None:
        """Let the sequences of requests that are over leave."""
        kept = {caller: deque(pair for pair in queue if not pair[0].is_over) for caller, queue in self._queues.items()}
        self._queues = {caller: queue for caller, queue in kept.items() if queue}

    def _compute_limit(self, caller: str) -> int:
        if not caller:
            return self._max_waiting
        others = sum(1 for name in self._queues if name and name != caller)
        return self._max_waiting // (2 + others)
