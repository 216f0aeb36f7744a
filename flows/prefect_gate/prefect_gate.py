"""Prefect's server behind a gate: `python -m flows.prefect_gate` instead of `prefect server start`.

Only routes on the allow-lists of `flows.prefect_gate.route_rules` are forwarded, so that routes which an upgrade adds
stay closed. Password guessing is rate-limited. A content security policy keeps browsers from loading anything from
other hosts, which Prefect's newer pages do (an analytics host) although analytics are off.
"""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

import uvicorn

from flows.allowed_flows import is_schema_of_flow
from flows.prefect_gate.body_rules import (
    EVENT_PAGES_PATH,
    SCHEMA_VALIDATION_PATH,
    PrefectInputRefused,
    check_message,
    check_page_token,
    check_values,
    find_unstorable_address,
    parse_request_body,
)
from flows.prefect_gate.deployment_rules import find_foreign_deployment
from flows.prefect_gate.route_rules import OPERATOR_ROUTES, PUBLIC_ROUTES, WEBSOCKET_METHOD, WEBSOCKET_ROUTES, is_page
from infra.http_server import choose_listen_options, make_server_options
from infra.request_body import (
    AsgiApp,
    AsgiMessage,
    AsgiReceive,
    AsgiScope,
    AsgiSend,
    ClientDisconnected,
    RequestBodyRefused,
    read_body,
    replay_body,
)
from infra.scram_only import require_scram
from infra.throttle import SignInThrottle

log = logging.getLogger(__name__)


IMAGE_HOST_VARIABLE = "COTRAIN_PORTAL_URL"  # the portal draws the plan that a round's artifact shows
PREFECT_ROUTE_CLOSED_MESSAGE = (
    "this route of Prefect's server is closed; flows/prefect_gate/route_rules.py lists the open ones"
)
WEBSOCKET_POLICY_VIOLATION = 1008
MAX_PREFECT_BODY_BYTES = 8 * 1024 * 1024
# Of a websocket: the first message is the password in a little JSON.
MAX_FIRST_MESSAGE_CHARACTERS = 4096
FIRST_MESSAGE_TIMEOUT_S = 10.0


class PrefectGate:
    """Forward requests on the allow-lists to an ASGI application, after checking the password where required.

    Args:
        app: Prefect's server.
        secret: the generated `user:password`; correct credentials always pass, so that rate limits cannot lock the
            platform out.
        image_host: a host from which pages may load images, besides Prefect's server.
        first_message_timeout_s: time within which a websocket's client must send its first message.
    """

    def __init__(
        self,
        app: AsgiApp,
        secret: str,
        image_host: str = "",
        *,
        first_message_timeout_s: float = FIRST_MESSAGE_TIMEOUT_S,
    ) -> None:
        self._app = app
        self._secret = secret.encode()
        self._first_message_timeout_s = first_message_timeout_s
        self._throttle = SignInThrottle()
        self._page_headers = build_page_headers(image_host)

    async def __call__(self, scope: AsgiScope, receive: AsgiReceive, send: AsgiSend) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        path, method = scope["path"], scope.get("method", WEBSOCKET_METHOD)
        if scope["type"] == "websocket":
            if not WEBSOCKET_ROUTES.is_allowed(method, path):
                return await send({"type": "websocket.close", "code": WEBSOCKET_POLICY_VIOLATION})
            is_refused = partial(self._is_first_message_refused, _get_client_address(scope))
            guard = WebsocketGuard(receive, send, is_refused, self._first_message_timeout_s)
            return await self._app(scope, guard.receive, guard.send)
        send = self._add_page_headers(send)
        if method == "HEAD" and PUBLIC_ROUTES.is_allowed("GET", path):
            # The keeper sends HEAD requests; uvicorn leaves the response's body out.
            method, scope = "GET", {**scope, "method": "GET"}
        if not (is_page(method, path) or PUBLIC_ROUTES.is_allowed(method, path)):
            if not OPERATOR_ROUTES.is_allowed(method, path):
                log.info("refused %s %s", method, path)
                return await _send_refusal(send, 403, PREFECT_ROUTE_CLOSED_MESSAGE)
            if (refusal := self._check_credentials(_parse_credentials(scope), _get_client_address(scope))) is not None:
                return await _send_refusal(send, *refusal)
            try:
                body = await read_body(receive, scope["headers"], MAX_PREFECT_BODY_BYTES)
            except ClientDisconnected:
                return
            except RequestBodyRefused as refused:
                return await _send_refusal(send, refused.status, str(refused))
            try:
                check_address(path, scope.get("query_string", b""))
                form, body = parse_request_body(path, body)
            except PrefectInputRefused as refused_values:
                return await _send_refusal(send, 422, str(refused_values))
            if (fault := find_foreign_deployment(path, form) or find_foreign_schema(path, form)) is not None:
                return await _send_refusal(send, 422, fault)
            receive = replay_body(body, receive)
        await self._app(scope, receive, send)

    def _check_credentials(self, credentials: bytes | None, address: str) -> tuple[int, str] | None:
        """Return None if the credentials are correct, else the status and message of the refusal."""
        if credentials is None:
            return 401, "sign in with one Basic authorization header"
        if hmac.compare_digest(credentials, self._secret):
            return None
        account = credentials.partition(b":")[0].decode(errors="replace")
        if wait_s := self._throttle.admit(account, address):
            return 429, f"too many wrong passwords; try again in {wait_s} s"
        return 401, "wrong user or password; PREFECT_AUTH in the settings has both"

    def _is_first_message_refused(self, address: str, message: AsgiMessage) -> bool:
        """Return True if a websocket's first message must not reach the server, which itself checks its password."""
        text = message.get("text")
        if text is None or len(text) > MAX_FIRST_MESSAGE_CHARACTERS:
            return True
        try:
            form = json.loads(text)
        except (ValueError, RecursionError):
            return True
        token = form.get("token") if isinstance(form, dict) else None
        refusal = self._check_credentials(None if token is None else str(token).encode(errors="replace"), address)
        return refusal is not None and refusal[0] == 429

    def _add_page_headers(self, send: AsgiSend) -> AsgiSend:
        async def with_headers(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self._page_headers]}
            await send(message)

        return with_headers


class WebsocketGuard:
    """Wrap receive and send of a websocket; close it if its first message is late or a message is refused.

    The server parses every message, even of megabytes, in the event loop that serves all clients, before it checks the
    password; and an event that it cannot store also loses events of other clients.
    """

    def __init__(
        self,
        receive: AsgiReceive,
        send: AsgiSend,
        is_first_message_refused: Callable[[AsgiMessage], bool],
        first_message_timeout_s: float,
    ) -> None:
        self._receive = receive
        self._send = send
        self._is_first_message_refused = is_first_message_refused
        self._first_message_timeout_s = first_message_timeout_s
        self._is_accepted = False
        self._is_sender_known = False
        self._is_closed = False

    async def receive(self) -> AsgiMessage:
        if not self._is_accepted:
            return await self._receive()
        try:
            async with asyncio.timeout(None if self._is_sender_known else self._first_message_timeout_s):
                message = await self._receive()
        except TimeoutError:
            return await self._close()
        if message["type"] == "websocket.receive":
            is_refused = _is_message_refused if self._is_sender_known else self._is_first_message_refused
            if is_refused(message):
                return await self._close()
            self._is_sender_known = True
        return message

    async def send(self, message: AsgiMessage) -> None:
        self._is_accepted = self._is_accepted or message["type"] == "websocket.accept"
        if not self._is_closed:
            await self._send(message)

    async def _close(self) -> AsgiMessage:
        await self._send({"type": "websocket.close", "code": WEBSOCKET_POLICY_VIOLATION})
        self._is_closed = True
        return {"type": "websocket.disconnect", "code": WEBSOCKET_POLICY_VIOLATION}


def build_page_headers(image_host: str) -> list[tuple[bytes, bytes]]:
    """Build headers that keep a browser from loading from other hosts, except images from `image_host`."""
    policy = (
        "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
        f"img-src 'self' data: blob: {image_host}; worker-src 'self' blob:; connect-src 'self'; "
        "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    return [
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]


def check_address(path: str, query: bytes) -> None:
    """Check a path and a query string, whose values also reach the server's database.

    Raises:
        PrefectInputRefused: naming the rule.
    """
    values = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    if (fault := find_unstorable_address(path, values)) is not None:
        raise PrefectInputRefused(fault)
    check_values(values)
    if path == EVENT_PAGES_PATH:
        check_page_token(values.get("page-token", ""))


def find_foreign_schema(path: str, form: Any) -> str | None:
    """Describe why a JSON schema in a body must not reach the server; None if it may.

    The server validates values against schemas of the client, in the thread that serves all requests; a pattern such as
    `^(a+)+$` blocks it indefinitely. So only the schemas of allowed flows are forwarded.
    """
    schema = form.get("schema") if path == SCHEMA_VALIDATION_PATH and isinstance(form, dict) else None
    if not schema or is_schema_of_flow(schema):
        return None
    return "schema must be the schema of a flow in flows/allowed_flows.py; send that one"


def _is_message_refused(message: AsgiMessage) -> bool:
    """Return True if a websocket's message after the first one must not reach the server."""
    try:
        check_message(message.get("text") or "")
    except PrefectInputRefused as refused:
        log.info("closed a websocket: %s", refused)
        return True
    return False


def _get_client_address(scope: AsgiScope) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""


def _parse_credentials(scope: AsgiScope) -> bytes | None:
    """Return `user:password` of the request's only Basic authorization header; None if there is not exactly one."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1 or not values[0].lower().startswith(b"basic "):
        return None
    try:
        return base64.b64decode(values[0][6:], validate=True)
    except binascii.Error:
        return None


async def _send_refusal(send: AsgiSend, status: int, message: str) -> None:
    """Send an error response with the JSON schema that Prefect's client and pages display."""
    body = json.dumps({"exception_message": message}).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Run the server with its migrations and background services, which its lifespan starts."""
    # Imported here, since Prefect's server takes seconds to import, and the gate's own classes do not need it.
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    require_scram()
    api = get_current_settings().server.api
    if api.auth_string is None:
        raise ValueError("Prefect's server needs a password; set PREFECT_SERVER_API_AUTH_STRING to user:password")
    gate = PrefectGate(
        create_app(final=True), api.auth_string.get_secret_value(), os.environ.get(IMAGE_HOST_VARIABLE, "")
    )
    log.setLevel(logging.INFO)
    # Forwarded headers are not trusted: with them, a client could use a new address for each password guess.
    uvicorn.run(
        gate,
        proxy_headers=False,
        access_log=False,
        log_level="info",
        **choose_listen_options(f"http://{api.host}:{api.port}"),
        **make_server_options(has_websockets=True),
    )
