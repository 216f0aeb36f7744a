"""The interval between checkpoints: given, or as short as saving costs at most a share of the time. Without torch.

Runs decide by these functions, and `yuan.checkpoint_estimate` estimates with them.

A lost process or node costs the steps since the last checkpoint: at most one interval, and the start of the ranks.
"""

import math
import statistics

MAX_SAVING_SHARE = 0.05  # of the time, that checkpoints may cost
MIN_SAVE_PAUSE_S = 60.0  # small models would save every few steps, which gains less than it wears the disk
NUM_TIMED_STEPS = 4  # after a checkpoint, whose median is the time of a step


def compute_save_pause_s(cost_s: float, write_s: float) -> float:
    """Compute the shortest seconds from one checkpoint to the next.

    Args:
        cost_s: seconds that training loses by one.
        write_s: seconds until its files are written, before which the next one would wait.

    >>> compute_save_pause_s(5.0, 40.0), compute_save_pause_s(0.0, 90.0), compute_save_pause_s(0.0, 0.1)
    (100.0, 90.0, 60.0)
    """
    return max(cost_s / MAX_SAVING_SHARE, write_s, MIN_SAVE_PAUSE_S)


def compute_saving_cost_s(blocked_s: float, write_s: float, *, is_asynchronous: bool, is_on_cpu: bool) -> float:
    """Compute the seconds that training loses by one checkpoint.

    Args:
        blocked_s: for which training stops: to copy the states or, if saving is synchronous, until they are written.
        write_s: until its files are written.
        is_on_cpu: the threads that write take the processors from training.
    """
    return blocked_s + (write_s if is_asynchronous and is_on_cpu else 0.0)


def compute_interval_steps(cost_s: float, write_s: float, step_seconds: float) -> int:
    """Compute the steps from one checkpoint to the next, of at least NUM_TIMED_STEPS, by which they are timed.

    >>> compute_interval_steps(5.0, 40.0, 10.0), compute_interval_steps(0.1, 1.0, 30.0)
    (10, 4)
    """
    return max(NUM_TIMED_STEPS, math.ceil(compute_save_pause_s(cost_s, write_s) / step_seconds))


def compute_upload_pause_s(upload_s: float) -> float:
    """Compute the seconds from the end of an upload to the next one, which makes uploads MAX_SAVING_SHARE of the time.

    >>> round(compute_upload_pause_s(2.0), 6)
    38.0
    """
    return upload_s * (1 / MAX_SAVING_SHARE - 1)


class CheckpointInterval:
    """Decide after which steps a run saves a checkpoint; the same on every rank that gets the same calls.

    A chosen interval is decided NUM_TIMED_STEPS after each checkpoint, from what that one and those steps took.

    Args:
        every_steps: a given interval, counted from step 0; None: choose it.

    Attributes:
        steps: the interval in use; None until it is chosen.
    """

    def __init__(self, every_steps: int | None) -> None:
        self.steps = every_steps
        self._is_given = every_steps is not None
        self._saved_step = 0
        self._seconds: list[float] = []

    def note_checkpoint(self, step: int) -> None:
        """Count from the checkpoint of a step, which was saved or restored."""
        self._saved_step = step
        self._seconds.clear()

    def add_step(self, seconds: float) -> bool:
        """Add a step after the last checkpoint; return True if the interval is to be chosen now."""
        self._seconds.append(seconds)
        return not self._is_given and len(self._seconds) == NUM_TIMED_STEPS

    @property
    def step_seconds(self) -> float:
        """Return the median of the steps since the last checkpoint."""
        return statistics.median(self._seconds)

    def choose(self, cost_s: float, write_s: float, step_seconds: float) -> int:
        """Choose the interval from measured seconds, which must be the same on all ranks; return its steps."""
        self.steps = compute_interval_steps(cost_s, write_s, step_seconds)
        return self.steps

    def is_due(self, step: int) -> bool:
        """Return True if a checkpoint is to be saved after a step."""
        if self.steps is None:
            return False
        return step % self.steps == 0 if self._is_given else step - self._saved_step >= self.steps
