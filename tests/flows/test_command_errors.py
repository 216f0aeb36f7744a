"""Test the line that a command prints for a server that is wrong, broken or down, and how soon it does."""

import ssl
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from botocore.exceptions import EndpointConnectionError
from mlflow.exceptions import MlflowException
from typer.testing import CliRunner

from flows.cli.app import app
from flows.cli.error_lines import describe_failure
from infra.certificates import ensure_certificate
from tests.flows.test_command_arguments import OFFLINE_SETTINGS

WITHDRAW = ["withdraw", "report", "0" * 32, "--reason", "r", "--token", "t", "--url"]
MAX_ANSWER_S = 3.0


def make_handler(status, content_type, body):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


@contextmanager
def serve(handler, tls_context=None):
    """Serve with a handler in a thread; yield the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # a client that speaks another protocol
    if tls_context is not None:
        server.socket = tls_context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def run_at_once(arguments, **options):
    """Run a command in this process; it must end within seconds. Return its exit status and its line of error."""
    started_at = time.monotonic()
    result = CliRunner().invoke(app, arguments, **options)
    assert time.monotonic() - started_at < MAX_ANSWER_S
    assert result.stderr.count("\n") == 1 and result.stdout == "", result.output
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("status", "content_type", "body", "line"),
    [
        (200, "text/html", b"<html>\x1b[2J", "is not that of a portal"),
        (200, "application/json", b"[1", "is not that of a portal"),
        (200, "application/json", b"[" * 5000, "is not that of a portal"),
        (200, "application/json", b'{"id": 5}', "is not that of a portal"),
        (
            404,
            "text/html",
            b"<html>no such page</html>",
            "has no error object (status 404, text/html, begins with '<html>",
        ),
        (401, "text/html", b"You are not authenticated", "is not that of a portal: it has no error object (status 401"),
        (404, "application/json", b'{"detail": "Not Found"}', "is not that of a portal: it has no error object"),
        (400, "application/json", b'{"error_code": "BAD", "message": "m"}', "is not that of a portal"),
        (
            404,
            "application/json",
            b'{"error": {"message": "Not Found", "type": "http"}}',
            "it has no route /api/v1/feedback/",
        ),
        (
            401,
            "application/json",
            b'{"error": {"message": "no such token", "type": "x"}}',
            "no such token; check --token, COTRAIN_TOKEN",
        ),
        (307, "text/plain", b"", "is not that of a portal: it has no error object (status 307, text/plain, empty)"),
        (500, "application/json", b'{"error": null}', "is not that of a portal"),
    ],
)
def test_answer_that_is_not_the_portals_is_one_line(status, content_type, body, line):
    with serve(make_handler(status, content_type, body)) as port:
        exit_code, error = run_at_once([*WITHDRAW, f"http://127.0.0.1:{port}"])
    assert exit_code == 1 and line in error and error.strip().isprintable()
    assert ("check --token" in error) == ("no such token" in line) != ("check the address" in error)


def test_an_address_with_the_path_of_the_api_is_named(tmp_path):
    with serve(make_handler(404, "application/json", b'{"error": {"message": "m", "type": "http"}}')) as port:
        _, error = run_at_once([*WITHDRAW, f"http://127.0.0.1:{port}/api/v1"])
    assert "it has no route /api/v1/api/v1/feedback/" in error and "the portal's without /api/v1 or /v1" in error


@pytest.fixture(scope="module")
def tls_context(tmp_path_factory):
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    ensure_certificate(file, "test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


@pytest.mark.parametrize(
    ("scheme", "reason"), [("http", "if it speaks HTTPS, write https://"), ("https", "certificate verify failed")]
)
def test_port_of_another_protocol_or_unknown_certificate_is_one_line_at_once(scheme, reason, tls_context):
    with serve(make_handler(200, "text/html", b""), tls_context) as port:
        exit_code, error = run_at_once([*WITHDRAW, f"{scheme}://127.0.0.1:{port}"])
    assert exit_code == 1 and f"the server at {scheme}://127.0.0.1:{port} " in error and reason in error


def test_https_at_a_port_without_tls_is_one_line_at_once():
    with serve(make_handler(200, "text/html", b"")) as port:
        exit_code, error = run_at_once([*WITHDRAW, f"https://127.0.0.1:{port}"])
    assert exit_code == 1 and f"the server at https://127.0.0.1:{port} speaks no HTTPS" in error
    assert "write the address with http://" in error


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("http://127.0.0.1:99999", "must have a port from 1 to 65535, got 'http://127.0.0.1:99999'"),
        ("http://127.0.0.1:-1", "must have a port from 1 to 65535"),
        ("http://127.0.0.1:0", "must have a port from 1 to 65535"),
        ("http://127.0.0.1:abc", "must be an address such as http://HOST:PORT (Invalid port: 'abc')"),
        ("http://[::1", "must be an address such as http://HOST:PORT"),
        ("http://", "must begin with http:// or https:// and name a host"),
        ("ftp://x", "must begin with http:// or https:// and name a host"),
        ("127.0.0.1:8800", "must begin with http:// or https:// and name a host"),
        ("http://a b", "must begin with http:// or https:// and name a host"),
        ("http://user:p@127.0.0.1", "must have no user, query or fragment"),
    ],
)
def test_an_address_that_no_portal_can_have_is_a_usage_error(url, rule, tmp_path):
    exit_code, error = run_at_once([*WITHDRAW, url])
    assert exit_code == 2 and "'--url'" in error and rule in error and "; correct it" in error

    exit_code, error = run_at_once(WITHDRAW[:-1], env={"COTRAIN_PORTAL_URL": url})
    assert exit_code == 2 and "(env var: 'COTRAIN_PORTAL_URL')" in error and rule in error

    (tmp_path / "env").write_text(f"COTRAIN_PORTAL_URL={url}\n")
    exit_code, error = run_at_once(WITHDRAW[:-1], env={"COTRAIN_HOME": str(tmp_path)})
    assert exit_code == 1 and f"COTRAIN_PORTAL_URL in {tmp_path}/env" in error and rule in error


def test_the_operators_token_is_sent_to_no_other_portal(tmp_path):
    (tmp_path / "env").write_text(OFFLINE_SETTINGS)
    arguments = ["withdraw", "account", "a", "--reason", "r", "--url", "http://127.0.0.1:10"]
    exit_code, error = run_at_once(arguments, env={"COTRAIN_HOME": str(tmp_path)})
    assert exit_code == 2 and "'--url': must be http://127.0.0.1:9, the portal of this installation's operator" in error


@pytest.mark.parametrize("command", [["generate"], ["evaluate"], ["export", "--out", "out"]])
@pytest.mark.parametrize("settings", ["", OFFLINE_SETTINGS])
def test_a_version_is_judged_by_its_form_before_the_stack(command, settings, tmp_path):
    (tmp_path / "env").write_text(settings)
    for text in ("7.0", "a b", "9" * 30):
        exit_code, error = run_at_once([*command, text], env={"COTRAIN_HOME": str(tmp_path)})
        assert exit_code == 2 and "a version must be 7 or v7" in error and "version'" in error.lower()

    exit_code, error = run_at_once([*command, "typo"], env={"COTRAIN_HOME": str(tmp_path)})
    stack_fault = "PostgreSQL cannot be used" if settings else "no usable settings"
    note = "cotrain: 'typo' is no version as 7 or v7, and cannot be looked up as an alias: "
    assert exit_code == 1 and error.startswith(f"{note}{stack_fault}")
    assert stack_fault in run_at_once([*command, "7"], env={"COTRAIN_HOME": str(tmp_path)})[1].split(": ")[1]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MlflowException("no such model\nin the registry"), "MLflow refused the request: no such model; see `cotrain"),
        (EndpointConnectionError(endpoint_url="http://x"), "the object store cannot be used (Could not connect to"),
        (
            FileNotFoundError(2, "No such file or directory", "a.toml"),
            "a.toml cannot be used: No such file or directory",
        ),
        (OSError(28, "No space left on device", "out"), "out cannot be written: No space left on device; make room"),
    ],
)
def test_error_of_each_server_names_it_in_one_line(error, line):
    assert describe_failure(error).startswith(line)
