"""Wait for a condition that another process or thread fulfils, and fail the test if it does not."""

from infra.polling import poll_until


def wait_until(condition, timeout_s=90.0, pause_s=0.05):
    """Poll the condition until it returns a true value, and return that value.

    Raises:
        AssertionError: if the time is over first.
    """
    value = poll_until(condition, timeout_s=timeout_s, pause_s=pause_s)
    assert value, f"the condition did not become true within {timeout_s:.0f} s"
    return value
