"""Decide by the losses of validations when a run ends, and which of its checkpoints is the best."""


class EarlyStop:
    """Follow the validation losses of a run; equal on every rank, since the losses are.

    Attributes:
        best_step, best_loss: the validation with the lowest loss, the earliest of equal ones; None before the first.

    Args:
        patience: validations without a new lowest loss after which the run is over; None: it never is.

    >>> stop = EarlyStop(patience=2)
    >>> for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.0)):
    ...     stop.add(step, loss)
    >>> stop.best_step, stop.is_over
    (20, True)
    """

    def __init__(self, patience: int | None) -> None:
        self._patience = patience
        self._num_without_gain = 0
        self.best_step: int | None = None
        self.best_loss: float | None = None

    def add(self, step: int, loss: float) -> None:
        """Add the loss of a validation after a step."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss = step, loss
            self._num_without_gain = 0
        else:
            self._num_without_gain += 1

    @property
    def is_over(self) -> bool:
        return self._patience is not None and self._num_without_gain >= self._patience
