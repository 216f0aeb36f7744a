"""The gate in front of MLflow: closed routes, limited password guessing, a page that finds its workspace.

MLflow trusts every caller from loopback, and there any account could make it run commands (its assistant). So requests
reach it only by the allow-lists of `infra.mlflow_rules`. It also reads bodies of any length into memory, and has one
loop and a few threads for everybody: so they reach it whole, within the bounds of `infra.mlflow_requests`, and a few at
a time. `mlflow server --app-name cotrain` loads `create_app`.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from infra.lanes import Lane, LaneFull
from infra.mlflow_requests import Refused, check_form, check_graphql, check_parameters, read_form
from infra.mlflow_rules import (
    ADMINISTRATOR_RULES,
    CONSUMER_RULES,
    PUBLIC_RULES,
    READER,
    UPLOAD_RULES,
    Rule,
    allows,
)
from infra.request_body import PAUSE_S, BodyRefused, ClientLeft, Headers, Message, Receive, has_body, read_body, replay
from infra.throttle import Throttle, is_machine_secret

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ADMINISTRATOR_VARIABLE = "MLFLOW_AUTH_ADMIN_USERNAME"  # MLflow's own: the account that it makes at its first start
DIGESTS_VARIABLE = "COTRAIN_MACHINE_SECRET_DIGESTS"  # of generated secrets, which the throttle lets pass
CHALLENGE = (b"www-authenticate", b'Basic realm="mlflow"')
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
CLOSED = "this route is not open to this account; see docs/security.md"
BUSY = "MLflow has as many requests as it can work on; try again"
RETRY_AFTER = (b"retry-after", b"5")
MAX_BODY_BYTES, MAX_ADMINISTRATOR_BODY_BYTES = 2**20, 16 * 2**20
MAX_INSIDE, MAX_WAITING, MAX_WAIT_S = 8, 64, 30.0  # MLflow has 40 threads
SEND_S = 60.0  # for a client to take a part of an answer, which waits in memory

# MLflow's pages read the workspace from the address's fragment, which no server sees, and show nothing without it.
# The stored values are their own switches, set where the visitor has not chosen: open no assistant, send no usage data,
# show no advertisement of either, list runs rather than traces.
PAGE_SCRIPT = """\
var page = location.hash.length > 2 ? location.hash : "#/models";
if (!/[?&]workspace=/.test(page))
  history.replaceState(null, "", page + (page.includes("?") ? "&" : "?") + "workspace=default");
var choices = {
  "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": true,
  "mlflow.settings.telemetry.enabled_v1": false,
  "mlflow.telemetry.info.alert.dismissed_v1": true,
  "_mlflow_model_registry_promo_modal_dismissed_v1": true,
  "mlflow.workflowType_v1": "machine_learning",
};
for (var name in choices)
  if (localStorage.getItem(name) === null) localStorage.setItem(name, JSON.stringify(choices[name]));
"""
# The browser refuses what a page would load from other hosts.
PAGE_POLICY = "; ".join(
    (
        "default-src 'self'",
        f"script-src 'self' 'sha256-{base64.b64encode(hashlib.sha256(PAGE_SCRIPT.encode()).digest()).decode()}'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "frame-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)


def create_app() -> App:
    """Return MLflow's server with basic authentication, behind the gate."""
    from mlflow.server.auth import create_app as create_mlflow

    return Gate(create_mlflow(), os.environ[ADMINISTRATOR_VARIABLE], os.environ[DIGESTS_VARIABLE].split())


@dataclass(frozen=True)
class Lanes:
    """Where requests of the same accounts wait for one another: while a body is read, and for their answers."""

    bodies: Lane = field(default_factory=lambda: Lane(MAX_WAITING, 0, 0))
    answers: Lane = field(default_factory=lambda: Lane(MAX_INSIDE, MAX_WAITING, MAX_WAIT_S))


class Gate:
    """An ASGI application that forwards a request only if it is on its caller's list.

    The name in the Basic header chooses the list, and the same header, rewritten by the gate, is all by which MLflow
    can authenticate the request; so a false name gains nothing. Only the configured administrator has the wider list:
    accounts that MLflow calls administrators besides have a consumer's.
    """

    def __init__(self, app: App, administrator: str, machine_digests: Iterable[str], pause_s: float = PAUSE_S) -> None:
        self._app, self._administrator = app, administrator
        self._machine_digests = tuple(machine_digests)
        self._pause_s = pause_s
        self._throttle = Throttle()
        # The administrator, which is the platform, waits in none of these; its reader waits for no other account.
        self._visitors = Lane(MAX_INSIDE, MAX_WAITING, MAX_WAIT_S)
        self._accounts, self._reader = Lanes(), Lanes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            await self._admit(scope, receive, send)
        except ClientLeft:
            return
        except Refusal as refusal:
            await refusal.send(send, is_unread=has_body(scope["headers"]))

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if not is_plain_path(scope):
            raise Refusal(403, CLOSED)
        if allows(PUBLIC_RULES, method, path):
            return await self._show(scope, receive, send)
        caller = read_credentials(scope["headers"])
        if caller is None:
            raise Refusal(401, "sign in with one Basic authorization header", CHALLENGE)
        if not allows(self._rules(caller), method, path):
            raise Refusal(403, CLOSED)
        await self._sign_in(caller, scope, receive, send)

    def _rules(self, caller: "Credentials") -> tuple[Rule, ...]:
        return ADMINISTRATOR_RULES if caller.name == self._administrator else CONSUMER_RULES

    async def _show(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request that needs no account; probes of its health wait for nobody."""
        if has_body(scope["headers"]):
            raise Refusal(413, "this route takes no body")
        lane = None if scope["path"] == "/health" else self._visitors
        await self._forward(lane, _with_headers(scope, None), receive, send)

    async def _sign_in(self, caller: "Credentials", scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request with its caller's credentials, unless too many of them were wrong lately."""
        forwarded = _with_headers(scope, caller)
        answer = PageSend(send) if scope["path"] == "/" and scope["method"] == "GET" else send
        if is_machine_secret(caller.name, caller.password, self._machine_digests):
            if caller.name == self._administrator:
                if not allows(UPLOAD_RULES, scope["method"], scope["path"]):
                    receive = await self._check(scope, receive, MAX_ADMINISTRATOR_BODY_BYTES, is_trusted=True)
                return await self._app(forwarded, receive, answer)
            lanes = self._reader if caller.name == READER else self._accounts
            return await self._forward(lanes.answers, forwarded, await self._read(lanes, scope, receive), answer)
        address = scope["client"][0]  # the connection's, since uvicorn is told to believe no forwarded header
        if wait_s := self._throttle.admit(caller.name, address):
            message = f"too many wrong passwords; try again in {wait_s} s"
            raise Refusal(429, message, (b"retry-after", str(wait_s).encode()))

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] != 401:
                self._throttle.succeed(caller.name, address)
            await answer(message)

        try:
            receive = await self._read(self._accounts, scope, receive)
            await self._forward(self._accounts.answers, forwarded, receive, watch)
        except (Refusal, ClientLeft):
            self._throttle.succeed(caller.name, address)  # the password was not looked at, so nothing was guessed
            raise

    async def _read(self, lanes: "Lanes", scope: Scope, receive: Receive) -> Receive:
        """Read and check what an account other than the administrator asks."""
        try:
            check_parameters(scope["query_string"])
        except Refused as error:
            raise Refusal(400, str(error)) from None
        if not has_body(scope["headers"]):
            return await self._check(scope, receive, 0)
        with _busy():
            async with lanes.bodies.enter():
                return await self._check(scope, receive, MAX_BODY_BYTES)

    async def _check(self, scope: Scope, receive: Receive, max_bytes: int, is_trusted: bool = False) -> Receive:
        """Read a body, and return what gives it to MLflow once it is a JSON object within its bounds."""
        try:
            body = await read_body(receive, scope["headers"], max_bytes, self._pause_s)
            form = read_form(body)
            if not is_trusted:
                check_form(form)
            if scope["path"] == "/graphql":
                check_graphql(form)
        except Refused as error:
            raise Refusal(400, str(error)) from None
        except BodyRefused as error:
            raise Refusal(error.status, str(error)) from None
        return replay(body, receive)

    async def _forward(self, lane: Lane | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Let MLflow answer, in its turn; a client that does not take its answer loses it, and its place."""
        is_stalled = False

        async def send_soon(message: Message) -> None:
            nonlocal is_stalled
            try:
                async with asyncio.timeout(SEND_S):
                    await send(message)
            except TimeoutError:
                is_stalled = True
                raise

        try:
            if lane is None:
                return await self._app(scope, receive, send_soon)
            with _busy():
                async with lane.enter():
                    await self._app(scope, receive, send_soon)
        except Exception:
            if not is_stalled:
                raise


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    try:
        yield
    except LaneFull:
        raise Refusal(429, BUSY, RETRY_AFTER) from None


@dataclass(frozen=True)
class Credentials:
    """Account and password of a request."""

    name: str
    password: str = field(repr=False)


def read_credentials(headers: Headers) -> Credentials | None:
    """Return the credentials if there is exactly one Authorization header and it is well-formed Basic, else None."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, encoded = values[0].partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        name, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return Credentials(name, password) if name and colon and not CONTROL.search(name + password) else None


def is_plain_path(scope: Scope) -> bool:
    r"""Tell whether a path means the same to the gate and to every router behind it.

    Refused: empty and dot segments, encoded slashes, a second layer of encoding, control characters, `\` and `;`.
    """
    path, raw = scope["path"], scope.get("raw_path", b"")
    return (
        path.startswith("/")
        and CONTROL.search(path) is None
        and re.search(r"//|/\.\.?(?:/|$)|[%\\;]", path) is None
        and raw.partition(b"?")[0].count(b"/") == path.count("/")
    )


def _with_headers(scope: Scope, caller: Credentials | None) -> Scope:
    """Return the scope with the gate's own Authorization header and without any other that MLflow could believe."""
    headers = [(name, value) for name, value in scope["headers"] if not _is_dropped(name, scope["path"])]
    if caller is not None:
        pair = f"{caller.name}:{caller.password}".encode()
        headers.append((b"authorization", b"Basic " + base64.b64encode(pair)))
    return {**scope, "headers": headers}


def _is_dropped(name: bytes, path: str) -> bool:
    """Drop other credentials, names that WSGI folds into others, and for the page what makes its answer partial."""
    credentials = name in (b"authorization", b"cookie", b"x-mlflow-authorization", b"proxy-authorization")
    forwarded = name == b"forwarded" or name.startswith(b"x-forwarded-") or b"_" in name
    partial = path == "/" and (name == b"range" or name.startswith(b"if-"))
    return credentials or forwarded or partial


class PageSend:
    """Send the page of MLflow's interface with a policy for the browser and a script that chooses the workspace."""

    def __init__(self, send: Send) -> None:
        self._send, self._body = send, b""
        self._start: Message = {}

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() not in _REPLACED]
        if self._start["status"] == 200:
            script = f"<head><script>{PAGE_SCRIPT}</script>".encode()
            self._body = self._body.replace(b"<head>", script, 1)
            headers += [(b"content-security-policy", PAGE_POLICY.encode()), (b"cache-control", b"no-store")]
        headers.append((b"content-length", str(len(self._body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": self._body})


_REPLACED = (b"content-length", b"etag", b"last-modified", b"cache-control", b"content-security-policy")


class Refusal(Exception):
    """An answer of the gate's own, in MLflow's form, which its client library shows."""

    def __init__(self, status: int, message: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers

    async def send(self, send: Send, is_unread: bool) -> None:
        """Answer, and close the connection if a body may still be coming, which nobody reads."""
        body = json.dumps({"error_code": _CODES[self.status], "message": str(self)}).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *self.headers]
        if is_unread:
            head.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": self.status, "headers": head})
        await send({"type": "http.response.body", "body": body})


_CODES = {
    400: "INVALID_PARAMETER_VALUE",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    408: "BAD_REQUEST",
    413: "BAD_REQUEST",
    429: "REQUEST_LIMIT_EXCEEDED",
}
