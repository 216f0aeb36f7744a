"""Refuse to send a plain-text password to a PostgreSQL server, for which asyncpg has no option.

A program that binds the port while PostgreSQL is down could request it. Clients of libpq set
`require_auth=scram-sha-256` instead.
"""

import struct
from typing import Any

from asyncpg import protocol

# PostgreSQL's protocol, version 3: a message has its type, its length without the type byte, and its content. The
# content of an authentication message begins with a request code.
AUTHENTICATION_TYPE = b"R"
MESSAGE_HEADER = struct.Struct("!ci")
SCRAM_REQUEST_ORDER = [10, 11, 12, 0]  # SASL (asyncpg supports only SCRAM), SASLContinue, SASLFinal, Ok
MAX_SIGN_IN_MESSAGE_BYTES = 64 * 1024


def require_scram() -> None:
    """Make every later asyncpg connection of this process authenticate by SCRAM, or fail."""
    protocol.Protocol = ScramOnlyProtocol


class ScramOnlyProtocol(protocol.Protocol):  # type: ignore[misc]  # asyncpg is not typed
    """Check each authentication message before asyncpg's protocol receives it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._incomplete = b""  # the received part of a message
        self._request_codes: list[int] = []  # the server's authentication requests so far
        self._is_signed_in = False

    def data_received(self, data: bytes) -> None:
        """Receive data from the server.

        Raises:
            ConnectionError: if the server requests anything but SCRAM, or accepts this client without it; the
                connection is closed.
        """
        if not self._is_signed_in:
            data, self._incomplete = self._check_messages(self._incomplete + data)
        if data:
            super().data_received(data)

    def _check_messages(self, data: bytes) -> tuple[bytes, bytes]:
        """Check the messages until authentication has ended; return the checked data, and an incomplete message."""
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
        # Only the order is checked here; asyncpg verifies that the server knows the password.
        self._request_codes.append(int.from_bytes(content[:4], "big"))
        if self._request_codes != SCRAM_REQUEST_ORDER[: len(self._request_codes)]:
            raise ConnectionError(
                f"PostgreSQL must request SCRAM (10, 11, 12 and 0), got {self._request_codes}; "
                "another program may hold its port"
            )
        self._is_signed_in = self._request_codes == SCRAM_REQUEST_ORDER
