"""Test the limit on password guessing with a fake clock."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from infra.throttle import SignInThrottle, compute_credential_digest, is_machine_secret


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def throttle(clock):
    return SignInThrottle(max_account_failures=3, max_address_failures=10, window_s=60, max_entries=50, clock=clock)


def test_guesses_beyond_the_limit_wait_until_the_oldest_leaves_the_window(throttle, clock):
    for clock.now in (0.0, 10.0, 20.0):
        assert throttle.admit("ann", "10.0.0.1") == 0
    clock.now = 30.0
    assert throttle.admit("ann", "10.0.0.1") == 30
    clock.now = 60.0
    assert throttle.admit("ann", "10.0.0.1") == 0
    assert throttle.admit("ann", "10.0.0.1") == 10


def test_lockout_applies_to_one_account_at_one_address(throttle):
    while not throttle.admit("ann", "10.0.0.1"):
        pass
    assert throttle.admit("ann", "10.0.0.2") == 0
    assert throttle.admit("bob", "10.0.0.1") == 0


def test_one_address_that_guesses_many_names_is_limited(throttle):
    admitted = [name for name in range(100) if not throttle.admit(f"user-{name}", "10.0.0.1")]
    assert len(admitted) == 10
    assert throttle.admit("user-0", "10.0.0.2") == 0


def test_successful_sign_ins_neither_lock_out_nor_reset_the_limit_of_a_guesser(throttle):
    for _ in range(100):
        assert throttle.admit("ann", "10.0.0.1") == 0
        throttle.note_success("ann", "10.0.0.1")
    for _ in range(3):
        assert throttle.admit("ann", "10.0.0.1") == 0
    throttle.note_success("bob", "10.0.0.1")
    assert throttle.admit("ann", "10.0.0.1") > 0


def test_parallel_guesses_are_counted_before_they_are_checked(throttle):
    with ThreadPoolExecutor(16) as pool:
        admitted = [wait for wait in pool.map(lambda _: throttle.admit("ann", "10.0.0.1"), range(200)) if not wait]
    assert len(admitted) == 3


def test_addresses_of_one_ipv6_network_count_as_one(throttle):
    for host in range(3):
        assert throttle.admit("ann", f"2001:db8::{host}") == 0
    assert throttle.admit("ann", "2001:db8::ffff") > 0
    assert throttle.admit("ann", "2001:db8:0:1::1") == 0
    assert throttle.admit("ann", "::ffff:10.0.0.1") == throttle.admit("ann", "::ffff:10.0.0.2") == 0


def test_number_of_counters_is_limited_and_the_least_recently_used_is_evicted(throttle):
    while not throttle.admit("ann", "10.0.0.1"):
        pass
    for n in range(1000):
        assert throttle.admit("ann", "10.0.0.1") > 0  # the entry with failures is kept
        throttle.admit("x" * 10_000, f"10.1.{n // 250}.{n % 250}")
    for n in range(1000):
        throttle.admit("x" * 10_000, f"10.2.{n // 250}.{n % 250}")
    assert throttle.admit("ann", "10.0.0.1") == 0


def test_only_the_exact_generated_secret_is_recognized():
    digests = [compute_credential_digest("cotrain", "right"), compute_credential_digest("consumer", "other")]
    assert is_machine_secret("cotrain", "right", digests)
    assert not is_machine_secret("cotrain", "other", digests)
    assert not is_machine_secret("consumer", "right", digests)
    assert not is_machine_secret("cotrain", "right", [])
