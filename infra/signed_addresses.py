"""Signed addresses of the object store that are renewed before they expire, and transfers that are repeated."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import httpx

TransferredT = TypeVar("TransferredT")
MAX_ARTIFACT_PART_ATTEMPTS = 4
PART_RETRY_PAUSE_S = 1.0  # doubled after each attempt


class SignedAddresses:
    """Signed addresses that are renewed before they expire, shared by threads.

    Args:
        sign: returns new ones, which are valid for longer than `valid_s` seconds.
    """

    def __init__(self, sign: Callable[[], Sequence[str]], valid_s: float) -> None:
        self._sign = sign
        self._valid_s = valid_s
        self._lock = threading.Lock()
        self._signed: Sequence[str] = ()
        self._expires_at = 0.0

    def get(self, index: int) -> str:
        with self._lock:
            if time.monotonic() >= self._expires_at:
                self._signed = self._sign()
                self._expires_at = time.monotonic() + self._valid_s
            return self._signed[index]

    def expire(self, index: int, address: str) -> None:
        """Make the next `get` sign again, unless another thread has done so since it got this address."""
        with self._lock:
            if self._signed[index] == address:
                self._expires_at = 0.0


def retry_transfer(transfer: Callable[[], TransferredT]) -> TransferredT:
    """Call a transfer of one part, which can be repeated, until it succeeds, at most MAX_ARTIFACT_PART_ATTEMPTS times.

    Raises:
        httpx.HTTPError: the last error; at once if the store refuses the request for another reason than its time.
    """
    for attempt in range(MAX_ARTIFACT_PART_ATTEMPTS):
        try:
            return transfer()
        except httpx.HTTPError as error:
            is_refused = (
                isinstance(error, httpx.HTTPStatusError)
                and 400 <= error.response.status_code < 500
                and error.response.status_code not in (403, 408, 429)
            )
            if is_refused or attempt == MAX_ARTIFACT_PART_ATTEMPTS - 1:
                raise
        time.sleep(PART_RETRY_PAUSE_S * 2**attempt)
    raise AssertionError("the loop returns or raises")
