"""Test what clients without certificate or signature can access in the running store, and presigned URL limits."""

import os
import socket
import ssl
import stat
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from feedback.tables import new_id
from flows.stack.stack_config import WEED_PORT_NAMES, load_config
from infra.keeper import find_stack_pids
from tests.waiting import wait_until

PATHS = [
    *("/", "/ui/index.html", "/metrics", "/debug/pprof/", "/debug/vars", "/admin", "/stats/counter", "/buckets/"),
    *(
        "/dir/assign",
        "/dir/lookup?volumeId=1",
        "/dir/status",
        "/vol/status",
        "/vol/grow?count=1",
        "/vol/vacuum",
        "/submit",
    ),
    *("/cluster/status", "/col/delete?collection=x", "/1,01637037d6", "/?pretty=y", "/?Action=ListUsers"),
    *(
        "/cotrain",
        "/cotrain/",
        "/cotrain/probe",
        "/cotrain?acl",
        "/cotrain?policy",
        "/cotrain?uploads",
        "/cotrain/probe?acl",
    ),
    *("/mlflow", "/cotrain/..%2fmlflow/probe", "/cotrain/probe?versionId=null", "/cotrain/probe?torrent"),
]
PROBES = ("/healthz", "/readyz", "/status")  # S3 responds to these with an empty body
ACTIONS = ("ListUsers", "CreateUser", "CreateAccessKey", "PutUserPolicy", "AssumeRole", "AssumeRoleWithWebIdentity",
           "AssumeRoleWithLDAPIdentity", "GetCallerIdentity", "GetSessionToken", "GetFederationToken")  # fmt: skip


@pytest.fixture(scope="module")
def weed(stores):
    """Return the store's configuration and pid."""
    config = load_config(stores.home)
    pids = [
        pid for pid in find_stack_pids(config.stack_id) if Path(f"/proc/{pid}/exe").resolve().name.startswith("weed")
    ]
    assert len(pids) == 1
    return config, pids[0]


@pytest.fixture(scope="module")
def s3(stores):
    with httpx.Client(base_url=stores.s3_endpoint, timeout=10) as client:
        yield client


def find_sockets(pid):
    links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    return {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")}


def find_listening_ports(pid):
    """Return (address, port) of every TCP socket on which a process listens, of both families."""
    rows = [
        row.split() for family in ("tcp", "tcp6") for row in Path(f"/proc/net/{family}").read_text().splitlines()[1:]
    ]
    own_sockets = find_sockets(pid)
    listeners = [row[1].split(":") for row in rows if row[3] == "0A" and row[9] in own_sockets]
    return sorted({(address, int(port, 16)) for address, port in listeners})


def can_exchange_over_tls(port, version):
    """Return True if a client without the store's certificate can exchange data over TLS."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw, context.wrap_socket(raw) as wrapped:
            wrapped.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
            return wrapped.recv(1) != b""  # with TLS 1.3 the server refuses only after the handshake
    except (ssl.SSLError, ConnectionError):
        return False


def request_without_tls(port):
    """Return the response to a client without TLS."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        try:
            raw.sendall(b"GET /dir/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return raw.recv(4096)
        except ConnectionError:
            return b""


def test_the_store_listens_on_its_known_ports_of_loopback_only(weed):
    config, pid = weed
    expected_ports = {config.ports[name] for name in WEED_PORT_NAMES} | {
        config.ports[f"{name}_grpc"] for name in WEED_PORT_NAMES
    }
    listening_ports = find_listening_ports(pid)
    assert {address for address, _ in listening_ports} == {"0100007F"}
    assert {port for _, port in listening_ports} == expected_ports


def test_every_port_except_s3_refuses_clients_without_certificate(weed):
    config, pid = weed
    for _, port in find_listening_ports(pid):
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert not can_exchange_over_tls(port, version), port
        if port != config.ports["s3"]:
            response = request_without_tls(port)
            assert response.startswith(b"HTTP/1.0 400") or b"HTTP/1" not in response, (port, response)


def test_unix_sockets_of_the_store_are_accessible_to_its_owner_only(weed):
    _, pid = weed
    rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()[1:]]
    own_sockets = find_sockets(pid)
    paths = [Path(row[7]) for row in rows if len(row) > 7 and row[6] in own_sockets and row[7].startswith("/")]
    assert len(paths) >= len(WEED_PORT_NAMES)
    for path in paths:
        closed = [stat.S_IMODE(place.stat().st_mode) & 0o077 == 0 for place in (path, path.parent)]
        assert any(closed), path


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "POST", "DELETE"])
def test_unsigned_s3_requests_cannot_read_or_write(s3, objects, method):
    before = objects.list_keys("")
    for path in PATHS:
        response = s3.request(method, path, content=b"x" if method in ("PUT", "POST") else None)
        assert response.status_code in (400, 403, 404, 405, 501), (path, response.status_code, response.text)
        assert "<Contents>" not in response.text and "pppp" not in response.text
    for path in PROBES:
        assert s3.get(path).content == b""
    assert objects.list_keys("") == before


@pytest.mark.parametrize("action", ACTIONS)
def test_unsigned_requests_cannot_create_an_identity(s3, action):
    parameters = {"Action": action, "UserName": "me", "RoleArn": "arn:aws:iam::1:role/x", "RoleSessionName": "me"}
    for version in ("2010-05-08", "2011-06-15"):
        response = s3.post(
            "/",
            data={**parameters, "WebIdentityToken": "x", "LDAPUsername": "x", "LDAPPassword": "x", "Version": version},
        )
        assert response.status_code >= 400 and "<AccessKeyId>" not in response.text, response.text


@pytest.fixture
def upload(objects):
    """Return a key and its presigned URL for an upload of five bytes of text."""
    key = f"uploads/{new_id()}"
    yield key, objects.presign_upload(key, 5, "text/plain", 60)
    objects.delete(key)


def test_a_presigned_upload_stores_its_object_and_a_download_reads_it(objects, upload):
    key, url = upload
    assert httpx.put(url, content=b"12345", headers={"Content-Type": "text/plain"}).status_code == 200
    response = httpx.get(objects.presign_download(key, 60))
    assert response.content == b"12345" and response.headers["content-type"] == "text/plain"


@pytest.mark.parametrize(
    ("change", "request_"),
    [
        ("another key", {"url": lambda url: url.replace("uploads/", "uploads/x")}),
        ("a longer body", {"content": b"123456"}),
        ("a shorter body", {"content": b"1234"}),
        ("another type", {"headers": {"Content-Type": "text/html"}}),
        ("no type", {"headers": {}}),
        ("a body in chunks", {"content": [b"12", b"345"]}),
        ("another method", {"method": "POST"}),
        ("reading", {"method": "GET", "content": None}),
        ("deleting", {"method": "DELETE", "content": None}),
        ("a longer time", {"url": lambda url: url.replace("X-Amz-Expires=60", "X-Amz-Expires=600")}),
        ("a part of another upload", {"url": lambda url: url + "&partNumber=1&uploadId=x"}),
        ("access rights", {"url": lambda url: url + "&acl"}),
        ("a copy", {"headers": {"Content-Type": "text/plain", "x-amz-copy-source": "/cotrain/probe"}}),
        ("metadata", {"headers": {"Content-Type": "text/plain", "x-amz-meta-a": "b"}}),
    ],
)  # fmt: skip
def test_presigned_upload_is_refused_when_the_request_differs(objects, upload, change, request_):
    key, url = upload
    changed = {"method": "PUT", "content": b"12345", "headers": {"Content-Type": "text/plain"}, **request_}
    content = iter(changed.pop("content")) if isinstance(changed["content"], list) else changed.pop("content")
    response = httpx.request(url=changed.pop("url", lambda same: same)(url), content=content, **changed)
    assert response.status_code in (403, 405), (change, response.text)
    assert not objects.exists(key)


def test_chunked_upload_with_a_content_length_is_refused(objects, upload):
    key, url = upload
    parts = urlsplit(url)
    head = f"PUT {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: text/plain\r\n"
    head += "Content-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as raw:
        raw.sendall(head.encode() + b"9\r\n123456789\r\n0\r\n\r\n")
        assert raw.recv(64).split()[1] in (b"400", b"403")
    assert not objects.exists(key)


def test_presigned_download_is_refused_for_other_objects_and_methods(objects, upload):
    key, _ = upload
    objects.put(key, b"12345")
    url = objects.presign_download(key, 60)
    for response in (
        httpx.get(url.replace(key, "probe")),
        httpx.get(f"{url}&acl"),
        httpx.get(f"{url}&response-content-type=text%2Fhtml"),
        httpx.put(url, content=b"other"),
        httpx.delete(url),
    ):
        assert response.status_code == 403
    assert objects.get(key) == b"12345"


def test_presigned_url_expires(objects, upload):
    key, _ = upload
    download, upload_again = objects.presign_download(key, 1), objects.presign_upload(key, 5, "text/plain", 1)
    objects.put(key, b"12345")
    assert wait_until(lambda: httpx.get(download).status_code == 403, timeout_s=30)
    assert httpx.put(upload_again, content=b"54321", headers={"Content-Type": "text/plain"}).status_code == 403
    assert objects.get(key) == b"12345"


@pytest.mark.parametrize(("num_bytes", "valid_s"), [(-1, 60), (5 * 2**30 + 1, 60), (5, 0), (5, 3601)])
def test_presigned_url_size_and_validity_are_limited(objects, num_bytes, valid_s):
    with pytest.raises(ValueError, match="must be from"):
        objects.presign_upload("uploads/x", num_bytes, "text/plain", valid_s)
