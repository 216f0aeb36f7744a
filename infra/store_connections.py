"""Send and fetch parts of files at signed addresses of the object store, over connections that are kept open.

The standard library's client reads a response straight into a buffer, a mebibyte at a time; httpx reads 64 KiB at a
time into new objects, which costs twice the processor's time. It follows no redirect and uses no proxy. The errors here
are httpx's, like those of other servers, without the query of the address, which is a secret while it is valid.
"""

import contextlib
import http.client
import os
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

import httpx

STORE_BLOCK_BYTES = 2**20
STORE_TIMEOUT_S = 120.0  # without a byte
MAX_STORE_ERROR_BYTES = 64 * 1024  # read of a response that is not a part
STORE_ERROR_CODE_PATTERN = re.compile(rb"<Code>(\w{1,64})</Code>")
ResponseT = TypeVar("ResponseT")


class StoreConnections:
    """Hold connections to the store for several threads, each of which uses one at a time; close them at the end."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}  # by protocol and host
        self._lock = threading.Lock()

    def __enter__(self) -> "StoreConnections":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the idle connections; the threads that use others must have ended."""
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()

    def put(self, address: str, data: bytes) -> str:
        """Store bytes at an address, and return their ETag.

        Raises:
            httpx.HTTPStatusError: if the store refuses them.
            httpx.TransportError: if it does not answer, or not as a store does.
        """

        def read_tag(response: http.client.HTTPResponse) -> str:
            tag = response.headers["ETag"]
            with translate_store_errors("PUT", address):
                response.read(MAX_STORE_ERROR_BYTES)
                if response.status != 200 or not tag:
                    raise http.client.HTTPException(
                        f"a store must answer with status 200 and an ETag, got {response.status}"
                    )
            return str(tag)

        return self._request("PUT", address, {}, data, read_tag)

    def fetch_range(self, address: str, start: int, end: int, descriptor: int) -> None:
        """Write the bytes from start to end of a stored file into an open file, at the same place.

        Raises:
            OSError: if they cannot be written.
            httpx.HTTPStatusError: if the store refuses the request.
            httpx.TransportError: if it does not answer, or with other bytes than these.
        """

        def read_range(response: http.client.HTTPResponse) -> None:
            with translate_store_errors("GET", address):
                if response.status != 206 or response.length != end - start:
                    raise http.client.HTTPException(
                        f"a part must come with status 206 and {end - start} bytes, got {response.status} and "
                        f"{response.length}"
                    )
            buffer, position = memoryview(bytearray(min(STORE_BLOCK_BYTES, end - start))), start
            while position < end:
                with translate_store_errors("GET", address):
                    num_read = response.readinto(buffer[: end - position])
                    if not num_read:
                        raise http.client.HTTPException(f"{end - position} bytes of a part are missing")
                write_at(descriptor, buffer[:num_read], position)
                position += num_read

        self._request("GET", address, {"Range": f"bytes={start}-{end - 1}"}, None, read_range)

    def _request(
        self,
        method: str,
        address: str,
        headers: dict[str, str],
        data: bytes | None,
        read: Callable[[http.client.HTTPResponse], ResponseT],
    ) -> ResponseT:
        """Send a request, and return what `read` returns for its response, unless the store refuses it."""
        parts = urlsplit(address)
        connection = self._take_connection(parts)
        try:
            with translate_store_errors(method, address):
                response = _send(connection, method, f"{parts.path}?{parts.query}", headers, data)
                if response.status >= 300:
                    raise _make_status_error(method, address, response)
            result = read(response)
        except BaseException:
            connection.close()
            raise
        if response.isclosed():  # the whole response was read
            with self._lock:
                self._idle.setdefault((parts.scheme, parts.netloc), []).append(connection)
        else:
            connection.close()
        return result

    def _take_connection(self, parts: SplitResult) -> http.client.HTTPConnection:
        with self._lock:
            if idle := self._idle.get((parts.scheme, parts.netloc)):
                return idle.pop()
        if parts.scheme == "https":
            return http.client.HTTPSConnection(parts.netloc, timeout=STORE_TIMEOUT_S, context=self._tls)
        return http.client.HTTPConnection(parts.netloc, timeout=STORE_TIMEOUT_S)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context(trust_env=False)


@contextlib.contextmanager
def translate_store_errors(method: str, address: str) -> Iterator[None]:
    """Raise httpx's errors for those of a connection in the block, so that the errors of all servers have one type."""
    try:
        yield
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error), request=_describe_request(method, address)) from error
    except http.client.HTTPException as error:
        message = str(error) or type(error).__name__
        raise httpx.RemoteProtocolError(message, request=_describe_request(method, address)) from error
    except (ConnectionResetError, BrokenPipeError) as error:
        raise httpx.ReadError(str(error), request=_describe_request(method, address)) from error
    except OSError as error:
        raise httpx.ConnectError(str(error), request=_describe_request(method, address)) from error


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all bytes at a position of a file, of which the system may write fewer at once."""
    while data:
        num_written = os.pwrite(descriptor, data, position)
        data, position = data[num_written:], position + num_written


def _send(
    connection: http.client.HTTPConnection, method: str, target: str, headers: dict[str, str], data: bytes | None
) -> http.client.HTTPResponse:
    """Send a request; once more on a new connection if the store has closed the idle one meanwhile."""
    is_reused = connection.sock is not None
    try:
        return _exchange(connection, method, target, headers, data)
    except (ConnectionError, http.client.HTTPException):
        if not is_reused:
            raise
    connection.close()
    return _exchange(connection, method, target, headers, data)


def _exchange(
    connection: http.client.HTTPConnection, method: str, target: str, headers: dict[str, str], data: bytes | None
) -> http.client.HTTPResponse:
    try:
        connection.request(method, target, data, headers)
    except (BrokenPipeError, ConnectionResetError) as error:  # a store need not read the data that it refuses
        try:
            return connection.getresponse()
        except (OSError, http.client.HTTPException):
            raise error from None
    return connection.getresponse()


def _make_status_error(method: str, address: str, response: http.client.HTTPResponse) -> httpx.HTTPStatusError:
    body = response.read(MAX_STORE_ERROR_BYTES)
    request, code = _describe_request(method, address), STORE_ERROR_CODE_PATTERN.search(body)
    return httpx.HTTPStatusError(
        f"the store answered {method} {request.url} with {response.status} "
        f"{code[1].decode() if code else response.reason}",
        request=request,
        response=httpx.Response(response.status, content=body, request=request),
    )


def _describe_request(method: str, address: str) -> httpx.Request:
    """Return a request without the signature."""
    return httpx.Request(method, address.partition("?")[0])
