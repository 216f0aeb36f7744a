"""The interval between checkpoints: given, or as short as saving costs at most a share of the time. Without torch.

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
        self.steps = max(NUM_TIMED_STEPS, math.ceil(compute_save_pause_s(cost_s, write_s) / step_seconds))
        return self.steps

    def is_due(self, step: int) -> bool:
        """Return True if a checkpoint is to be saved after a step."""
        if self.steps is None:
            return False
        return step % self.steps == 0 if self._is_given else step - self._saved_step >= self.steps
