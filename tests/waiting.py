"""Wait for a condition that another process or thread fulfils."""

import time


def until(condition, seconds=90.0, pause=0.05):
    """Poll the condition until it returns a true value, and return that value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"did not happen in {seconds:.0f} s"
        time.sleep(pause)
    return value
