"""Limit password guessing: failed sign-ins per account and peer address, within a sliding window."""

import hashlib
import hmac
import ipaddress
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

MAX_ACCOUNT_FAILURES = 20  # of one account from one address
MAX_ADDRESS_FAILURES = 100  # from one address, whatever the account
THROTTLE_WINDOW_S = 300.0
MAX_THROTTLE_COUNTERS = 20_000


class SignInThrottle:
    """Count failed sign-ins in memory and refuse more than a limit in any window.

    An attempt counts as failed from `admit` until `note_success` removes it, so that parallel guesses cannot pass
    between check and count. A success removes only its own attempt: a user who signs in from the same address must not
    give an attacker new attempts. Refused attempts do not count, so a lock-out ends by itself.

    The address must be the connection's peer, never a forwarded header (uvicorn: `--no-proxy-headers`). IPv6 addresses
    are counted per /64 network, since one machine owns all of it. At most `max_entries` counters are kept; the least
    recently used is removed first.
    """

    def __init__(
        self,
        *,
        max_account_failures: int = MAX_ACCOUNT_FAILURES,
        max_address_failures: int = MAX_ADDRESS_FAILURES,
        window_s: float = THROTTLE_WINDOW_S,
        max_entries: int = MAX_THROTTLE_COUNTERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = (max_account_failures, max_address_failures)
        self._window_s = window_s
        self._max_entries = max_entries
        self._clock = clock
        self._failures: OrderedDict[bytes, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, account: str, address: str) -> int:
        """Count an attempt and return 0, or return the seconds to wait (for Retry-After) if there were too many.

        Call it before the password is checked, and refuse the attempt unchecked if the result is not 0: a response
        that depends on the password would let the attacker continue guessing.
        """
        now = self._clock()
        with self._lock:
            wait_s = 0.0
            counters = [self._get_counter(key, now) for key in _make_counter_keys(account, address)]
            for failures, limit in zip(counters, self._limits, strict=True):
                if len(failures) >= limit:
                    wait_s = max(wait_s, failures[-limit] + self._window_s - now)
            if wait_s > 0:
                return math.ceil(wait_s)
            for failures in counters:
                failures.append(now)
        return 0

    def note_success(self, account: str, address: str) -> None:
        """Remove the last admitted attempt from the count, since its password was correct."""
        with self._lock:
            for key in _make_counter_keys(account, address):
                if self._failures.get(key):
                    self._failures[key].pop()

    def _get_counter(self, key: bytes, now: float) -> deque[float]:
        """Return a counter without the failures that are older than the window."""
        failures = self._failures.setdefault(key, deque())
        while failures and failures[0] <= now - self._window_s:
            failures.popleft()
        self._failures.move_to_end(key)
        while len(self._failures) > self._max_entries:
            self._failures.popitem(last=False)
        return failures


def _make_counter_keys(account: str, address: str) -> tuple[bytes, bytes]:
    """Return the counters' keys, of a fixed size whatever name a client sends."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        network = address
    else:
        mapped = getattr(ip, "ipv4_mapped", None) or ip
        if mapped.is_loopback:
            network = "loopback"  # all 16 million addresses are one machine's
        elif ip.version == 6:
            network = str(ip.ipv4_mapped or ipaddress.ip_network((int(ip), 64), strict=False))
        else:
            network = str(ip)
    pair = f"{network}\n{account}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(b"account " + pair).digest(), hashlib.sha256(b"address " + network.encode()).digest()


def compute_credential_digest(account: str, password: str) -> str:
    """Return the sha256 with which a process recognizes a generated secret without storing it."""
    return hashlib.sha256(f"{account}:{password}".encode("utf-8", "surrogatepass")).hexdigest()


def is_machine_secret(account: str, password: str, digests: Iterable[str]) -> bool:
    """Tell, in constant time, whether a sign-in uses a generated secret of the platform, exempt from the throttle.

    Only for generated secrets of 128 bits or more: these cannot be guessed, and without the exemption an attacker could
    lock the platform out of its own services. For passwords that people choose, the exemption would be an oracle.

    >>> is_machine_secret("cotrain", "a", [compute_credential_digest("cotrain", "a")])
    True
    """
    digest = compute_credential_digest(account, password)
    return any([hmac.compare_digest(digest, secret_digest) for secret_digest in digests])
