"""Limit connections, request heads and waiting times of an HTTP server; every server of the stack uses these options.

`HttpProtocol` subclasses uvicorn's h11 protocol, which uvicorn itself uses if httptools is not installed.
"""

import asyncio
import json
import logging
import re
import resource
import socket
import time
from collections import OrderedDict
from http import HTTPStatus
from typing import Any, Literal, TypedDict
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from infra.listeners import is_listening

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 4000
MAX_REQUEST_HEAD_BYTES = 16 * 1024  # h11's default
MAX_WEBSOCKET_MESSAGE_BYTES = 1024 * 1024
CONNECTION_WARNING_PAUSE_S = 60.0
STDIN_DESCRIPTOR = 0


class ServerOptions(TypedDict):
    """Hold the keyword arguments of `uvicorn.run` and `uvicorn.Config`."""

    http: type[asyncio.Protocol]
    ws: Literal["auto", "none"]
    ws_max_size: int
    backlog: int


def make_server_options(*, has_websockets: bool = False) -> ServerOptions:
    """Return the uvicorn options for a server in this process.

    Args:
        has_websockets: the server has routes of websockets; without, a handshake is an ordinary request, so that its
            errors have the server's shape.
    """
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "http": HttpProtocol,
        "ws": "auto" if has_websockets else "none",
        "ws_max_size": MAX_WEBSOCKET_MESSAGE_BYTES,
        "backlog": choose_backlog(open_files),
    }


class ListenOptions(TypedDict, total=False):
    """Hold the keyword arguments of `uvicorn.run` that say where it listens."""

    fd: int
    host: str
    port: int


def choose_listen_options(url: str) -> ListenOptions:
    """Return where a server listens: on its standard input if that is a listening socket, else on a URL's address.

    The stack's keeper opens the socket, so that no other user can bind the port while the server restarts; see
    `infra.keeper.ManagedService`.
    """
    if is_listening_descriptor(STDIN_DESCRIPTOR):
        return {"fd": STDIN_DESCRIPTOR}
    parts = urlsplit(url)
    return {"host": parts.hostname or "127.0.0.1", "port": parts.port or 80}


def is_listening_descriptor(descriptor: int) -> bool:
    """Return True if a descriptor is a listening socket."""
    try:
        inherited = socket.socket(fileno=descriptor)
    except OSError:  # closed, or not a socket
        return False
    try:
        return is_listening(inherited)
    finally:
        inherited.detach()


def format_uvicorn_options() -> str:
    """Return the options for uvicorn's command line, with standard input as the listening socket.

    They are for a process that `infra.confined_child` starts with its file limit raised to the hard limit.
    """
    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    protocol = f"{HttpProtocol.__module__}:{HttpProtocol.__qualname__}"
    sizes = f"--ws-max-size {MAX_WEBSOCKET_MESSAGE_BYTES} --backlog {choose_backlog(open_files)}"
    return f"--fd {STDIN_DESCRIPTOR} --http {protocol} {sizes}"


def choose_connection_limit(open_files: int) -> int:
    """Return the maximum number of open connections: at most half of the file limit, since responses open files too.

    >>> choose_connection_limit(300), choose_connection_limit(65_536), choose_connection_limit(resource.RLIM_INFINITY)
    (150, 4000, 4000)
    """
    return MAX_CONNECTIONS if open_files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, open_files // 2)


def choose_backlog(open_files: int) -> int:
    """Return the size of the accept queue (the backlog of listen(2)).

    asyncio accepts all queued connections at once, before it reads from any. So the backlog is at most a quarter of
    the connection limit: an accepted client is not closed in favor of those behind it before its request is read.
    Three iterations of the event loop pass before a connection beyond the limit is closed, so four times the backlog
    takes at most half of the files that the connection limit leaves.

    >>> choose_backlog(300), choose_backlog(20_000), choose_backlog(resource.RLIM_INFINITY)
    (18, 1000, 1000)
    """
    limit = choose_connection_limit(open_files)
    if open_files == resource.RLIM_INFINITY:
        return limit // 4
    return max(1, min(limit // 4, (open_files - limit) // 8))


class StrictConnection(h11.Connection):
    """Keep the error of a malformed request; refuse a long head, and both Content-Length and Transfer-Encoding in one.

    A proxy that uses the other of the two headers would read the end of the body as the next request (request
    smuggling); RFC 9112, section 6.1 allows the refusal.

    Attributes:
        fault: why the last request is malformed; None if none was.
    """

    fault: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                names = {name for name, _ in event.headers}
                if b"content-length" in names and b"transfer-encoding" in names:
                    raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding in one request")
                if not event.http_version.startswith(b"1."):
                    status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
                    raise h11.RemoteProtocolError("the version is not HTTP/1", error_status_hint=status)
                # h11 itself limits only a head that arrives in parts.
                if count_head_bytes(event) > MAX_REQUEST_HEAD_BYTES:
                    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                    raise h11.RemoteProtocolError("head too long", error_status_hint=status)
                event = use_origin_form(event)
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise
        return event


def count_head_bytes(request: h11.Request) -> int:
    """Count the bytes of a request line and its headers, without optional white space.

    >>> count_head_bytes(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    27
    """
    line = len(request.method) + len(request.target) + len("  HTTP/1.1\r\n")
    return line + sum(len(name) + len(value) + len(": \r\n") for name, value in request.headers) + len("\r\n")


def use_origin_form(request: h11.Request) -> h11.Request:
    """Return a request for `http://host/path` as one for `/path`; a server must accept both (RFC 9112, section 3.2.2).

    >>> [use_origin_form(h11.Request(method="GET", target=target, headers=[("Host", "a")])).target
    ...  for target in ("http://a/b?c", "http://a?c", "HTTPS://a", "/b", "//a/b", "*")]
    [b'/b?c', b'/?c', b'/', b'/b', b'//a/b', b'*']
    """
    match = re.fullmatch(rb"(?i:https?)://[^/?]*(.*)", request.target)
    if match is None:
        return request
    target = match[1] if match[1].startswith(b"/") else b"/" + match[1]
    headers = list(request.headers)
    return h11.Request(method=request.method, target=target, headers=headers, http_version=request.http_version)


class HttpProtocol(H11Protocol):
    """Serve one connection; close it when a request head takes too long, or when a new connection needs its slot.

    A head may take `head_limit_s` from the start of the connection, or from the head's first byte on a kept-alive
    connection. At the connection limit, each new connection replaces one that keeps the server waiting (see
    `WaitingConnections`), so short requests are served however many idle connections arrive.
    """

    head_limit_s = 15.0

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = self.strict_connection = StrictConnection(h11.SERVER, MAX_REQUEST_HEAD_BYTES)
        self._waiting_connections = get_waiting_connections(server_state)
        self._group: ConnectionGroup | None = None
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()
        self._update_group()
        if len(self.connections) > self._waiting_connections.limit:
            self._waiting_connections.close_one()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_head_timer()
        self._move_to_group(None)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # A body that continues after its response delays the next head, and no application limits its time any more.
        is_answered_early = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if self.conn.their_state is h11.IDLE or is_answered_early:
            self._start_head_timer()
        else:
            self._stop_head_timer()
        self._update_group()

    def send_400_response(self, msg: str) -> None:
        """Respond to a malformed request with the form of the API's errors, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status, message = describe_malformed_request(self.strict_connection.fault)
            body = json.dumps({"error": {"message": message, "type": "invalid"}}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            response = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_group()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._update_group()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._update_group()

    def abort(self) -> None:
        """Close the connection at once, in any state."""
        self.connections.discard(self)
        self._move_to_group(None)
        self.transport.abort()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_limit_s, self.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _update_group(self) -> None:
        """Move the connection to the group of what the server waits for, if it waits."""
        is_closing, state = self.transport.is_closing(), self.conn.their_state
        is_idle = is_closing or state is h11.IDLE
        if self.flow.write_paused or (is_idle and self.transport.get_write_buffer_size()):
            self._move_to_group(self._waiting_connections.unread)
        elif is_closing:
            self._move_to_group(None)
        elif state is h11.IDLE:
            self._move_to_group(self._waiting_connections.without_head)
        elif state is h11.SEND_BODY:
            self._move_to_group(self._waiting_connections.without_body)
        else:
            self._move_to_group(None)

    def _move_to_group(self, group: "ConnectionGroup | None") -> None:
        if group is self._group:
            return
        if self._group is not None:
            self._group.pop(self, None)
        if group is not None:
            group[self] = None
        self._group = group


def describe_malformed_request(fault: h11.RemoteProtocolError | None) -> tuple[int, str]:
    """Return status and message of the refusal of a request that h11 cannot parse."""
    status = fault.error_status_hint if fault is not None else HTTPStatus.BAD_REQUEST
    if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
        return status, f"the request line and headers may have {MAX_REQUEST_HEAD_BYTES} bytes; send less"
    reason = str(fault).partition(":")[0]  # without the bytes received
    return status, f"the request is not valid HTTP ({reason}); correct it and send it again"


ConnectionGroup = OrderedDict[HttpProtocol, None]


class WaitingConnections:
    """Hold the connections that keep one server waiting, in three groups, each ordered with the longest wait first.

    The connection to close is taken from the largest group, so that a flood of one kind does not close connections of
    other kinds.

    Attributes:
        limit: maximum number of open connections.
        without_head: connections whose request head the server waits for.
        without_body: connections whose remaining body the server waits for.
        unread: connections whose client must read the response.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.without_head = ConnectionGroup()
        self.without_body = ConnectionGroup()
        self.unread = ConnectionGroup()
        self._warned_at = -CONNECTION_WARNING_PAUSE_S

    def close_one(self) -> None:
        """Close the longest-waiting connection of the largest group."""
        largest = max(self.without_head, self.without_body, self.unread, key=len)
        if largest:
            next(iter(largest)).abort()
        # A line per closed connection would fill the disk.
        if time.monotonic() - self._warned_at >= CONNECTION_WARNING_PAUSE_S:
            self._warned_at = time.monotonic()
            log.warning("all %d connections are in use; closing those that wait longest", self.limit)


_waiting_by_server: WeakKeyDictionary[ServerState, WaitingConnections] = WeakKeyDictionary()


def get_waiting_connections(server_state: ServerState) -> WaitingConnections:
    """Return the waiting connections of a server; the `ServerState` is all that uvicorn's connections share."""
    waiting = _waiting_by_server.get(server_state)
    if waiting is None:
        open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = _waiting_by_server[server_state] = WaitingConnections(choose_connection_limit(open_files))
    return waiting
