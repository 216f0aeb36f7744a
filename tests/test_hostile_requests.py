"""Send hostile requests to every route of the portal and of the model server, through their real servers."""

import gzip
import http.client
import json
import socket
from dataclasses import dataclass
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from sqlalchemy import func, update

from feedback.accounts import add_contributor, digest_token
from feedback.api.app import make_app
from feedback.tables import ApiToken, new_id
from infra.database import make_session_factory
from infra.http_server import MAX_REQUEST_HEAD_BYTES
from tests.routes import list_routes
from tests.serving import serve_app
from tests.yuan.model_server import TOKEN, make_served_model
from yuan.serve.api import make_api
from yuan.serve.metrics import ModelServerMetrics
from yuan.serve.service import ModelService
from yuan.serve.strict_requests import find_request_fault

JSON_TYPE = ("Content-Type", "application/json")
GZIPPED = gzip.compress(b"{}")
PUBLIC = {"/", "/docs", "/health", "/openapi.json", "/rounds/{number}/plan.svg"}


@dataclass(frozen=True)
class HostileRequest:
    """What is wrong with a request, and how every route refuses it."""

    status: int
    param: str
    headers: tuple = ()
    query: str = ""
    body: bytes = b"{}"


HOSTILE_REQUESTS = {
    "two keys": HostileRequest(422, "Idempotency-Key", (("Idempotency-Key", "a"), ("idempotency-key", "a"))),
    "two tokens": HostileRequest(422, "Authorization", (("Authorization", "Bearer a"),)),
    "two types": HostileRequest(422, "Content-Type", (JSON_TYPE,)),
    "two encodings": HostileRequest(422, "Content-Encoding", (("Content-Encoding", "identity"),) * 2),
    "two parameters": HostileRequest(422, "limit", query="?limit=1&limit=1"),
    "two parameters, one escaped": HostileRequest(422, "name", query="?name=a&x=1&n%61me=b"),
    "gzip": HostileRequest(415, "Content-Encoding", (("Content-Encoding", "gzip"),), body=GZIPPED),
    "two codings": HostileRequest(415, "Content-Encoding", (("Content-Encoding", "identity, br"),)),
    "deflate": HostileRequest(415, "Content-Encoding", (("Content-Encoding", "Deflate"),)),
}
RECORD_ID = "0" * 32
REFUSED_CHARSETS = ("latin-1", "UTF-16", '"gbk"', "")


class Server:
    """A running server: its routes, and a way to send requests."""

    def __init__(self, url, app, headers):
        self.address = urlsplit(url).netloc
        self.routes = sorted(route for route in list_routes(app) if route.method != "WEBSOCKET")
        self.headers = headers

    def send(self, method, target, headers=(), body=b""):
        """Send one request with these headers, repeated ones too; return status, headers and body."""
        connection = http.client.HTTPConnection(self.address, timeout=30)
        try:
            connection.putrequest(method, target, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return SimpleNamespace(status=response.status, headers=response.headers, text=response.read().decode())
        finally:
            connection.close()

    def send_bytes(self, data):
        """Send bytes and return all that the server answers until it closes the connection."""
        host, port = self.address.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(data)
            answer = b""
            while piece := connection.recv(65_536):
                answer += piece
        return answer


@pytest.fixture(scope="module")
def servers(stores, engine, objects, first_version):
    """Serve the portal, and a model behind it; the callers are operators, whom every route accepts."""
    service = ModelService(ModelServerMetrics())
    service.swap_in(make_served_model(1))
    model_app = make_api(TOKEN, service)
    with serve_app(model_app) as model_url:
        token = type(stores.model_server_token)(TOKEN)
        settings = stores.model_copy(update={"model_server_url": model_url, "model_server_token": token})
        portal_app = make_app(settings, engine, objects)
        with serve_app(portal_app) as url:
            operator = ("Authorization", f"Bearer {stores.operator_token.get_secret_value()}")
            yield {
                "portal": Server(url, portal_app, (operator, JSON_TYPE)),
                "model server": Server(model_url, model_app, (("Authorization", f"Bearer {TOKEN}"), JSON_TYPE)),
            }


@pytest.fixture(params=["portal", "model server"])
def server(request, servers):
    return servers[request.param]


def read_error(response):
    """Check the one form of errors and return the error."""
    assert response.headers["content-type"] == "application/json", response.text
    document = json.loads(response.text)
    error = document["error"]
    assert set(document) == {"error"} and error["message"].isprintable() and error["type"], error
    return error


@pytest.mark.parametrize("kind", HOSTILE_REQUESTS)
def test_every_route_refuses_ambiguous_or_compressed_requests(server, kind):
    hostile = HOSTILE_REQUESTS[kind]
    for route in server.routes:
        response = server.send(
            route.method, route.example() + hostile.query, server.headers + hostile.headers, hostile.body
        )
        assert response.status == hostile.status, (route, response.text)
        assert route.method == "HEAD" or read_error(response)["param"] == hostile.param, route


@pytest.mark.parametrize("key", ["dGhlIHNhbXBsZSBub25jZQ==", "x"])
def test_handshake_of_a_websocket_is_an_ordinary_request(server, key):
    upgrade = (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13"))
    for route in [route for route in server.routes if route.method == "GET"]:
        plain = server.send(route.method, route.example(), server.headers, b"{}")
        response = server.send(
            route.method, route.example(), (*server.headers, *upgrade, ("Sec-WebSocket-Key", key)), b"{}"
        )
        assert response.status == plain.status, (route, response.text)
        assert response.status < 400 or read_error(response)


def test_every_route_refuses_bodies_that_are_not_in_utf8(server):
    authorization, _ = server.headers
    for route in server.routes:
        for charset in REFUSED_CHARSETS:
            headers = (authorization, ("Content-Type", f"application/json; a=b; Charset={charset}"))
            response = server.send(route.method, route.example(), headers, b"{}")
            assert response.status == 415, (route, charset, response.text)
            assert route.method == "HEAD" or read_error(response)["param"] == "Content-Type"
        accepted = (authorization, ("Content-Type", 'application/json; charset="UTF-8"'), ("Content-Encoding", ""))
        expected = server.send(route.method, route.example(), server.headers, b"[]")
        assert server.send(route.method, route.example(), accepted, b"[]").status == expected.status


def test_every_route_reads_a_byte_order_mark_and_names_utf16(server):
    for route in server.routes:
        if route.method != "POST" or route.path == "/api/v1/datasets" or route.path.endswith(("/cancel", "/complete")):
            continue
        path = route.example(feedback_id=RECORD_ID, dataset_id=RECORD_ID)
        responses = {
            encoding: server.send("POST", path, server.headers, '{"no such field": 1}'.encode(encoding))
            for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")
        }
        plain = read_error(responses.pop("utf-8"))
        assert read_error(responses.pop("utf-8-sig")) == plain and "UTF" not in plain["message"]
        for response in responses.values():
            assert response.status == 422
            assert read_error(response)["message"] == "must be JSON in UTF-8, got UTF-16 or UTF-32; encode it in UTF-8"


def test_every_route_authenticates_before_it_validates(servers, engine, account):
    server, sessions = servers["portal"], make_session_factory(engine)
    with sessions.begin() as session:
        revoked = add_contributor(session, f"test-{new_id()}").token
    bearer = ("Authorization", f"Bearer {revoked}")
    assert server.send("GET", "/v1/models", (bearer,)).status == 200  # the portal has seen the token while it was valid
    with sessions.begin() as session:
        session.execute(update(ApiToken).where(ApiToken.digest == digest_token(revoked)).values(revoked_at=func.now()))
    callers = {"none": (), "revoked": (bearer,), "unknown": (("Authorization", "Bearer x"),)}
    callers["not bearer"] = (("Authorization", "Basic eDp5"),)
    contributor = (("Authorization", f"Bearer {account.token}"),)
    closed = [route for route in server.routes if route.path not in PUBLIC]
    bodies = (b"{", b"\xff", b"[]", b'{"reason": "r"}', b"")
    for route in closed:
        for path in (route.example(), route.example(uuid="%00"), route.example() + "?x=1&y=%FF"):
            for body in bodies:
                for name, headers in callers.items():
                    response = server.send(route.method, path, (*headers, JSON_TYPE, ("Idempotency-Key", "é")), body)
                    assert response.status == 401, (route, path, name, body, response.text)
    operator_only = [route for route in closed if route.path.startswith(("/api/v1/contributors", "/api/v1/rounds"))]
    for route in operator_only:
        for body in bodies:
            response = server.send(route.method, route.example(), (*contributor, JSON_TYPE), body)
            assert response.status == 403, (route, body, response.text)


VARIANTS_OF_A_PATH = ("/{0}", "{0}/", "{0}/..", "/x/%2e%2e{0}", "{0}%0a", "{0}%00", "{0}%2f", "{0};a=b")


def test_variant_of_a_path_is_no_other_name_of_its_route(server):
    methods = ("GET", "HEAD", "OPTIONS", "TRACE", "POST", "PUT", "DELETE", "get", "X")
    for path in {route.example(feedback_id=RECORD_ID, dataset_id=RECORD_ID) for route in server.routes}:
        for variant in VARIANTS_OF_A_PATH:
            for method in methods:
                response = server.send(method, variant.format(path), server.headers, b"{}")
                assert response.status in (404, 405, 422), (method, variant, path, response.text)
                assert method == "HEAD" or read_error(response)
                assert response.status != 405 or response.headers["allow"]


MALFORMED_REQUESTS = {
    b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * MAX_REQUEST_HEAD_BYTES + b"\r\n\r\n": 431,
    b"GET /" + b"x" * 2 * MAX_REQUEST_HEAD_BYTES: 431,
    b"GET / HTTP/1.1\r\n\r\n": 400,
    b"GET / HTTP/2.0\r\nHost: a\r\n\r\n": 505,
    b"GET / HTTP/0.9\r\n\r\n": 505,
    b"x" * 10_000 + b"\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"x" * 10_000 + b"\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n": 400,
    b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n": 400,
    b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n": 501,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 1\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n": 400,
}


@pytest.mark.parametrize("data", MALFORMED_REQUESTS, ids=lambda data: repr(data[:40]))
def test_malformed_request_gets_an_error_in_the_one_form(server, data):
    head, _, body = server.send_bytes(data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % MALFORMED_REQUESTS[data])
    assert b"connection: close" in head.lower() and b"content-type: application/json" in head.lower()
    error = json.loads(body)["error"]
    assert error["type"] == "invalid" and error["message"].isprintable() and len(error["message"]) < 300


@pytest.mark.parametrize(
    ("name", "value", "has_fault"),
    [
        ("content-type", 'multipart/form-data; boundary="a;charset=latin-1"', False),
        ("content-type", 'multipart/form-data; boundary="a\\";charset=latin-1"', False),
        ("content-type", 'multipart/form-data; boundary="a;b"; charset=latin-1', True),
        ("content-type", 'text/plain; charset="UTF-8" ; a=b', False),
        ("content-type", "text/plain; charset", True),
        ("content-encoding", "identity, identity", False),
        ("content-encoding", "identity, gzip", True),
    ],
)
def test_quoted_parameter_is_no_charset_and_identity_no_compression(name, value, has_fault):
    scope = {"path": "/", "headers": [(name.encode(), value.encode())], "query_string": b""}
    assert (find_request_fault(scope) is not None) == has_fault
