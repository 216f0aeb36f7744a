"""Refuse to show a password to a PostgreSQL server that asks for it as it is; asyncpg has no option for that.

Whoever holds the port while PostgreSQL is down could ask. Clients of libpq refuse by `require_auth=scram-sha-256`.
"""

import struct
from typing import Any

from asyncpg import protocol

# PostgreSQL's protocol, version 3: a message is its type, its length without the type, and its content. Those of
# signing in begin with a number.
AUTHENTICATION, HEAD = b"R", struct.Struct("!ci")
ORDER = [10, 11, 12, 0]  # SASL (SCRAM is the only way that asyncpg knows), SASLContinue, SASLFinal, Ok
LONGEST_MESSAGE = 64 * 1024


def require_scram() -> None:
    """Make every later asyncpg connection of this process sign in by SCRAM, or fail."""
    protocol.Protocol = ScramOnly


class ScramOnly(protocol.Protocol):  # type: ignore[misc]  # asyncpg is not typed
    """asyncpg's protocol, which gets each message only once it is known to ask for no password."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept = b""  # the beginning of a message
        self._asked: list[int] = []  # what the server asked for so far
        self._is_signed_in = False

    def data_received(self, data: bytes) -> None:
        """Take what the server sent.

        Raises:
            ConnectionError: if it asks for anything but SCRAM, or lets this client in without; the connection ends.
        """
        if not self._is_signed_in:
            data, self._kept = self._split(self._kept + data)
        if data:
            super().data_received(data)

    def _split(self, data: bytes) -> tuple[bytes, bytes]:
        """Check the messages until signing in has ended; return what may be read, and the beginning of a message."""
        start = 0
        while not self._is_signed_in:
            if len(data) < start + HEAD.size:
                return data[:start], data[start:]
            kind, length = HEAD.unpack_from(data, start)
            if not HEAD.size - 1 <= length <= LONGEST_MESSAGE:
                raise ConnectionError(f"PostgreSQL sent a message of {length} bytes while signing in")
            end = start + 1 + length
            if len(data) < end:
                return data[:start], data[start:]
            if kind == AUTHENTICATION:
                self._check(data[start + HEAD.size : end])
            start = end
        return data, b""

    def _check(self, content: bytes) -> None:
        # Whether the server knows the password is decided by asyncpg, once all of this came in its order.
        self._asked.append(int.from_bytes(content[:4], "big"))
        if self._asked != ORDER[: len(self._asked)]:
            raise ConnectionError(
                f"PostgreSQL must ask for SCRAM (10, 11, 12 and 0), got {self._asked}; "
                "another program may hold its port"
            )
        self._is_signed_in = self._asked == ORDER
