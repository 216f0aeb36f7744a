"""Filter requests to MLflow: route allow-lists, limited password guessing, bounded bodies, a default workspace.

MLflow trusts every client on loopback, where any account could make it run commands (its assistant). So it receives
only requests on the allow-lists of `infra.mlflow_rules`. MLflow also reads bodies of any length into memory, and has
one event loop and a few threads for all clients. So it receives only complete requests within the bounds of
`infra.mlflow_requests`, and a few at a time. `mlflow server --app-name cotrain` loads `create_app`.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from infra.artifact_streamer import ArtifactStreamer
from infra.mlflow_requests import (
    MlflowRequestRefused,
    check_graphql,
    check_json_bounds,
    check_query_parameters,
    parse_json_object,
)
from infra.mlflow_rules import (
    ADMINISTRATOR_RULES,
    CONSUMER_RULES,
    PUBLIC_RULES,
    READER_ACCOUNT,
    UPLOAD_RULES,
    RouteRule,
    is_route_allowed,
)
from infra.request_body import (
    MAX_BODY_PAUSE_S,
    AsgiApp,
    AsgiHeaders,
    AsgiMessage,
    AsgiReceive,
    AsgiScope,
    AsgiSend,
    ClientDisconnected,
    RequestBodyRefused,
    has_body,
    read_body,
    replay_body,
)
from infra.request_limiter import RequestLimiter, RequestLimitReached
from infra.throttle import SignInThrottle, is_machine_secret

ADMINISTRATOR_VARIABLE = "MLFLOW_AUTH_ADMIN_USERNAME"  # MLflow's variable: the account it creates at its first start
DIGESTS_VARIABLE = "COTRAIN_MACHINE_SECRET_DIGESTS"  # of generated secrets, which are exempt from the throttle
BASIC_CHALLENGE_HEADER = (b"www-authenticate", b'Basic realm="mlflow"')
CONTROL_CHARACTER_PATTERN = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MLFLOW_ROUTE_CLOSED_MESSAGE = "this route is not open to this account; see docs/security.md"
MLFLOW_BUSY_MESSAGE = "MLflow is processing as many requests as it can; retry in a few seconds"
RETRY_AFTER_HEADER = (b"retry-after", b"5")
MAX_MLFLOW_BODY_BYTES = 2**20
MAX_ADMINISTRATOR_BODY_BYTES = 16 * 2**20
MAX_CONCURRENT_REQUESTS = 8  # MLflow has 40 threads
MAX_WAITING_REQUESTS = 64
MAX_REQUEST_WAIT_S = 30.0
SEND_TIMEOUT_S = 60.0  # for a client to read a part of a response, which is kept in memory meanwhile

# MLflow's pages read the workspace from the URL's fragment, which browsers do not send to servers, and show nothing
# without it. The stored values are the pages' own settings, set only where the visitor has not chosen: do not open the
# assistant, send no usage data, show no advertisement of either, list runs rather than traces.
MLFLOW_PAGE_SCRIPT = """\
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
# With this policy the browser blocks all resources from other hosts.
MLFLOW_PAGE_POLICY = "; ".join(
    (
        "default-src 'self'",
        f"script-src 'self' 'sha256-{base64.b64encode(hashlib.sha256(MLFLOW_PAGE_SCRIPT.encode()).digest()).decode()}'",
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


def create_app() -> AsgiApp:
    """Return MLflow's server with Basic authentication, behind the gate."""
    # Imported here, since the keeper imports this module's names, and MLflow's server takes seconds to import.
    from mlflow.server.auth import create_app as create_mlflow

    from infra.resumable_artifacts import register_resumable_artifacts

    register_resumable_artifacts()
    return MlflowGate(
        ArtifactStreamer(create_mlflow()), os.environ[ADMINISTRATOR_VARIABLE], os.environ[DIGESTS_VARIABLE].split()
    )


@dataclass(frozen=True)
class AccountLimits:
    """Limit the concurrent requests of a group of accounts.

    Attributes:
        bodies: for requests whose body is being read.
        responses: for requests that MLflow processes.
    """

    bodies: RequestLimiter = field(default_factory=lambda: RequestLimiter(MAX_WAITING_REQUESTS, 0, 0))
    responses: RequestLimiter = field(
        default_factory=lambda: RequestLimiter(MAX_CONCURRENT_REQUESTS, MAX_WAITING_REQUESTS, MAX_REQUEST_WAIT_S)
    )


class MlflowGate:
    """Forward a request to an ASGI application only if it is on its caller's allow-list.

    The name in the Basic header selects the list. The same header, rewritten by the gate, is the only credential that
    MLflow receives, so a false name gains nothing. Only the configured administrator has the longer list: other
    accounts with administrator rights in MLflow have the list of a consumer.
    """

    def __init__(
        self, app: AsgiApp, administrator: str, machine_digests: Iterable[str], pause_s: float = MAX_BODY_PAUSE_S
    ) -> None:
        self._app = app
        self._administrator = administrator
        self._machine_digests = tuple(machine_digests)
        self._pause_s = pause_s
        self._throttle = SignInThrottle()
        # The administrator, which is the platform, is not limited; the platform's reader account has its own limits.
        self._visitors = RequestLimiter(MAX_CONCURRENT_REQUESTS, MAX_WAITING_REQUESTS, MAX_REQUEST_WAIT_S)
        self._accounts = AccountLimits()
        self._reader = AccountLimits()

    async def __call__(self, scope: AsgiScope, receive: AsgiReceive, send: AsgiSend) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            await self._admit(scope, receive, send)
        except ClientDisconnected:
            return
        except MlflowRefusal as refusal:
            await refusal.send(send, is_unread=has_body(scope["headers"]))

    async def _admit(self, scope: AsgiScope, receive: AsgiReceive, send: AsgiSend) -> None:
        method, path = scope["method"], scope["path"]
        if not is_plain_path(scope):
            raise MlflowRefusal(403, MLFLOW_ROUTE_CLOSED_MESSAGE)
        if is_route_allowed(PUBLIC_RULES, method, path):
            return await self._forward_public(scope, receive, send)
        caller = read_credentials(scope["headers"])
        if caller is None:
            raise MlflowRefusal(401, "sign in with one Basic authorization header", BASIC_CHALLENGE_HEADER)
        if not is_route_allowed(self._get_rules(caller), method, path):
            raise MlflowRefusal(403, MLFLOW_ROUTE_CLOSED_MESSAGE)
        await self._forward_signed_in(caller, scope, receive, send)

    def _get_rules(self, caller: "Credentials") -> tuple[RouteRule, ...]:
        return ADMINISTRATOR_RULES if caller.name == self._administrator else CONSUMER_RULES

    async def _forward_public(self, scope: AsgiScope, receive: AsgiReceive, send: AsgiSend) -> None:
        """Forward a request that needs no account; health probes never wait for a slot."""
        if has_body(scope["headers"]):
            raise MlflowRefusal(413, "this route takes no body")
        limiter = None if scope["path"] == "/health" else self._visitors
        await self._forward(limiter, _rewrite_headers(scope, None), receive, send)

    async def _forward_signed_in(
        self, caller: "Credentials", scope: AsgiScope, receive: AsgiReceive, send: AsgiSend
    ) -> None:
        """Forward a request with its caller's credentials, unless the throttle refuses the sign-in."""
        forwarded = _rewrite_headers(scope, caller)
        send_response = PageRewriter(send) if scope["path"] == "/" and scope["method"] == "GET" else send
        if is_machine_secret(caller.name, caller.password, self._machine_digests):
            if caller.name == self._administrator:
                if not is_route_allowed(UPLOAD_RULES, scope["method"], scope["path"]):
                    receive = await self._read_checked_body(
                        scope, receive, MAX_ADMINISTRATOR_BODY_BYTES, is_trusted=True
                    )
                return await self._app(forwarded, receive, send_response)
            limits = self._reader if caller.name == READER_ACCOUNT else self._accounts
            return await self._forward(
                limits.responses, forwarded, await self._check_request(limits, scope, receive), send_response
            )

        address = scope["client"][0]  # the connection's peer: uvicorn is configured to ignore forwarded headers
        if wait_s := self._throttle.admit(caller.name, address):
            message = f"too many wrong passwords; retry in {wait_s} s"
            raise MlflowRefusal(429, message, (b"retry-after", str(wait_s).encode()))

        async def watch(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start" and message["status"] != 401:
                self._throttle.note_success(caller.name, address)
            await send_response(message)

        try:
            receive = await self._check_request(self._accounts, scope, receive)
            await self._forward(self._accounts.responses, forwarded, receive, watch)
        except (MlflowRefusal, ClientDisconnected):
            self._throttle.note_success(caller.name, address)  # MLflow did not check the password, so this was no guess
            raise

    async def _check_request(self, limits: AccountLimits, scope: AsgiScope, receive: AsgiReceive) -> AsgiReceive:
        """Read and check the parameters and the body of a request that is not the administrator's."""
        try:
            check_query_parameters(scope["query_string"])
        except MlflowRequestRefused as error:
            raise MlflowRefusal(400, str(error)) from None
        if not has_body(scope["headers"]):
            return await self._read_checked_body(scope, receive, 0)
        with _refuse_when_full():
            async with limits.bodies.hold_slot():
                return await self._read_checked_body(scope, receive, MAX_MLFLOW_BODY_BYTES)

    async def _read_checked_body(
        self, scope: AsgiScope, receive: AsgiReceive, max_bytes: int, is_trusted: bool = False
    ) -> AsgiReceive:
        """Read a body, check that it is a JSON object within the bounds, and return a `receive` that replays it."""
        try:
            body = await read_body(receive, scope["headers"], max_bytes, self._pause_s)
            payload = parse_json_object(body)
            if not is_trusted:
                check_json_bounds(payload)
            if scope["path"] == "/graphql":
                check_graphql(payload)
        except MlflowRequestRefused as error:
            raise MlflowRefusal(400, str(error)) from None
        except RequestBodyRefused as error:
            raise MlflowRefusal(error.status, str(error)) from None
        return replay_body(body, receive)

    async def _forward(
        self, limiter: RequestLimiter | None, scope: AsgiScope, receive: AsgiReceive, send: AsgiSend
    ) -> None:
        """Forward a request when the limiter has a free slot; drop the response of a client that stops reading it."""
        is_stalled = False

        async def send_within_timeout(message: AsgiMessage) -> None:
            nonlocal is_stalled
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send(message)
            except TimeoutError:
                is_stalled = True
                raise

        try:
            if limiter is None:
                return await self._app(scope, receive, send_within_timeout)
            with _refuse_when_full():
                async with limiter.hold_slot():
                    await self._app(scope, receive, send_within_timeout)
        except Exception:
            if not is_stalled:
                raise


@contextlib.contextmanager
def _refuse_when_full() -> Iterator[None]:
    try:
        yield
    except RequestLimitReached:
        raise MlflowRefusal(429, MLFLOW_BUSY_MESSAGE, RETRY_AFTER_HEADER) from None


@dataclass(frozen=True)
class Credentials:
    """Hold the account and password of a request."""

    name: str
    password: str = field(repr=False)


def read_credentials(headers: AsgiHeaders) -> Credentials | None:
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
    return (
        Credentials(name, password)
        if name and colon and not CONTROL_CHARACTER_PATTERN.search(name + password)
        else None
    )


def is_plain_path(scope: AsgiScope) -> bool:
    r"""Return True if a path has the same meaning for the gate and for every router behind it.

    Refused: empty and dot segments, encoded slashes, a second layer of encoding, control characters, `\` and `;`.
    """
    path, raw = scope["path"], scope.get("raw_path", b"")
    return (
        path.startswith("/")
        and CONTROL_CHARACTER_PATTERN.search(path) is None
        and re.search(r"//|/\.\.?(?:/|$)|[%\\;]", path) is None
        and raw.partition(b"?")[0].count(b"/") == path.count("/")
    )


def _rewrite_headers(scope: AsgiScope, caller: Credentials | None) -> AsgiScope:
    """Return the scope with the gate's Authorization header and without other headers that MLflow could trust."""
    headers = [(name, value) for name, value in scope["headers"] if not _is_header_dropped(name, scope["path"])]
    if caller is not None:
        pair = f"{caller.name}:{caller.password}".encode()
        headers.append((b"authorization", b"Basic " + base64.b64encode(pair)))
    return {**scope, "headers": headers}


def _is_header_dropped(name: bytes, path: str) -> bool:
    """Return True if a header is to be dropped.

    Dropped are other credentials, names that WSGI maps to other names, and for the page the headers with which the
    response would not be the whole page (range and conditional requests).
    """
    credentials = name in (b"authorization", b"cookie", b"x-mlflow-authorization", b"proxy-authorization")
    forwarded = name == b"forwarded" or name.startswith(b"x-forwarded-") or b"_" in name
    partial = path == "/" and (name == b"range" or name.startswith(b"if-"))
    return credentials or forwarded or partial


class PageRewriter:
    """Send the page of MLflow's interface with a content security policy and a script that selects the workspace."""

    def __init__(self, send: AsgiSend) -> None:
        self._send = send
        self._body = b""
        self._start: AsgiMessage = {}

    async def __call__(self, message: AsgiMessage) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() not in _REPLACED_HEADERS]
        if self._start["status"] == 200:
            script = f"<head><script>{MLFLOW_PAGE_SCRIPT}</script>".encode()
            self._body = self._body.replace(b"<head>", script, 1)
            headers += [(b"content-security-policy", MLFLOW_PAGE_POLICY.encode()), (b"cache-control", b"no-store")]
        headers.append((b"content-length", str(len(self._body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": self._body})


_REPLACED_HEADERS = (b"content-length", b"etag", b"last-modified", b"cache-control", b"content-security-policy")


class MlflowRefusal(Exception):
    """Refuse a request in MLflow's error format, whose message its client library shows."""

    def __init__(self, status: int, message: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers

    async def send(self, send: AsgiSend, is_unread: bool) -> None:
        """Send the response, and close the connection if a body may still arrive, since it is not read."""
        body = json.dumps({"error_code": _ERROR_CODE_BY_STATUS[self.status], "message": str(self)}).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *self.headers]
        if is_unread:
            head.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": self.status, "headers": head})
        await send({"type": "http.response.body", "body": body})


_ERROR_CODE_BY_STATUS = {
    400: "INVALID_PARAMETER_VALUE",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    408: "BAD_REQUEST",
    413: "BAD_REQUEST",
    429: "REQUEST_LIMIT_EXCEEDED",
}
