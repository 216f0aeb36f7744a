"""Refuse to show a password to a PostgreSQL server that asks for it as it is; asyncpg has no option for that.

Whoever holds the port while PostgreSQL is down could ask. Clients of libpq refuse by `require_auth=scram-sha-256`.
"""

import struct
from typing import Any

from asyncpg import protocol

# PostgreSQL's protocol, version 3: a message is its type, its length without the type, and its content. Those of
# signing in begin with a number.
AUTHENTICATION_TYPE, MESSAGE_HEADER = b"R", struct.Struct("!ci")
SCRAM_REQUEST_ORDER = [10, 11, 12, 0]  # SASL (SCRAM is the only way that asyncpg knows), SASLContinue, SASLFinal, Ok
MAX_SIGN_IN_MESSAGE_BYTES = 64 * 1024


def require_scram() -> None:
    """Make every later asyncpg connection of this process sign in by SCRAM, or fail."""
    protocol.Protocol = ScramOnlyProtocol


class ScramOnlyProtocol(protocol.Protocol):  # type: ignore[misc]  # asyncpg is not typed
    """asyncpg's protocol, which gets each message only once it is known to ask for no password."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._incomplete = b""  # the beginning of a message
        self._request_codes: list[int] = []  # what the server asked for so far
        self._is_signed_in = False

    def data_received(self, data: bytes) -> None:
        """Take what the server sent.

        Raises:
            ConnectionError: if it asks for anything but SCRAM, or lets this client in without; the connection ends.
        """
        if not self._is_signed_in:
            data, self._incomplete = self._check_messages(self._incomplete + data)
        if data:
            super().data_received(data)

    def _check_messages(self, data: bytes) -> tuple[bytes, bytes]:
        """Check the messages until signing in has ended; return what may be read, and the beginning of a message."""
        start = 0
        while not self._is_signed_in:
            if len(data) < start + MESSAGE_HEADER.size:
                return data[:start], data[start:]
            kind, length = MESSAGE_HEADER.unpack_from(data, start)
            if not MESSAGE_HEADER.size - 1 <= length <= MAX_SIGN_IN_MESSAGE_BYTES:
                raise ConnectionError(f"PostgreSQL sent a message of {length} bytes while signing in")
            end = start + 1 + length
            if len(data) < end:
                return data[:start], data[start:]
            if kind == AUTHENTICATION_TYPE:
                self._check_request_order(data[start + MESSAGE_HEADER.size : end])
            start = end
        return data, b""

    def _check_request_order(self, content: bytes) -> None:
        # Whether the server knows the password is decided by asyncpg, once all of this came in its order.
        self._request_codes.append(int.from_bytes(content[:4], "big"))
        if self._request_codes != SCRAM_REQUEST_ORDER[: len(self._request_codes)]:
            raise ConnectionError(
                f"PostgreSQL must ask for SCRAM (10, 11, 12 and 0), got {self._request_codes}; "
                "another program may hold its port"
            )
        self._is_signed_in = self._request_codes == SCRAM_REQUEST_ORDER
