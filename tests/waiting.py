"""Wait for what happens elsewhere."""

import time


def until(condition, seconds=90.0, pause=0.05):
    """Wait for a true value and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"did not happen in {seconds:.0f} s"
        time.sleep(pause)
    return found
