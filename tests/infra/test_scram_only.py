"""Test that Prefect's server sends no password to another program on PostgreSQL's port."""

import asyncio
import contextlib
import struct
import subprocess

import asyncpg
import pytest

from flows.stack.platform_service import make_private_folders
from flows.stack.services import make_services
from flows.stack.stack_config import load_or_make_config, write_environment
from infra.listeners import open_listener
from infra.postgres import SSL_REQUEST
from infra.scram_only import MAX_SIGN_IN_MESSAGE_BYTES, ScramOnlyProtocol, require_scram
from infra.settings import Settings
from tests.infra.listening import listen_on_port
from tests.waiting import wait_until

PASSWORD = "secret-of-the-database"
CLEARTEXT = 3
MD5 = 5
KERBEROS = 7
SIGNED_IN = 0


@pytest.fixture(autouse=True)
def scram_only(monkeypatch):
    monkeypatch.setattr(asyncpg.protocol, "Protocol", asyncpg.protocol.Protocol)
    require_scram()
    assert asyncpg.protocol.Protocol is ScramOnlyProtocol


def make_message(kind, content):
    return struct.pack("!ci", kind, len(content) + 4) + content


def make_request(code, more=b""):
    return make_message(b"R", struct.pack("!i", code) + more)


SCRAM = make_request(10, b"SCRAM-SHA-256\0\0")
NOTICE = make_message(b"N", b"SNOTICE\0\0")


@pytest.mark.parametrize("size", [1, 3, 4096])
@pytest.mark.parametrize(
    ("sent", "refusal"),
    [
        (make_request(CLEARTEXT), "got [3]"),
        (make_request(MD5, b"salt"), "got [5]"),
        (make_request(KERBEROS), "got [7]"),
        (make_request(SIGNED_IN), "got [0]"),
        (NOTICE + make_request(CLEARTEXT), "got [3]"),
        (SCRAM + make_request(CLEARTEXT), "got [10, 3]"),
        (SCRAM + make_request(SIGNED_IN), "got [10, 0]"),
        (make_request(12, b"v=x") + make_request(SIGNED_IN), "got [12]"),
        (SCRAM + make_request(12, b"v=x") + make_request(SIGNED_IN), "got [10, 12]"),
        (SCRAM + SCRAM, "got [10, 10]"),
        (make_message(b"R", b""), "got [0]"),
        (struct.pack("!ci", b"R", 3), "a message of 3 bytes"),
        (struct.pack("!ci", b"N", MAX_SIGN_IN_MESSAGE_BYTES + 1), "bytes while signing in"),
    ],
)
def test_server_that_requests_a_method_other_than_scram_gets_no_password(sent, refusal, size):
    received = bytearray()

    async def answer(reader, writer):
        (length,) = struct.unpack("!i", await reader.readexactly(4))
        assert b"prefect" in await reader.readexactly(length - 4)
        for start in range(0, len(sent), size):
            writer.write(sent[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
        received.extend(await reader.read())
        writer.close()

    async def connect():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises((ConnectionError, asyncpg.PostgresError)) as refused:
                await asyncpg.connect(
                    host="127.0.0.1", port=port, user="prefect", password=PASSWORD, database="x", ssl=False
                )
            return "".join(f"{error}" for error in (refused.value, refused.value.__cause__))

    text = asyncio.run(asyncio.wait_for(connect(), 60))
    assert refusal in text
    assert PASSWORD.encode() not in received
    assert not received or (SCRAM in sent and b"SCRAM-SHA-256" in received)


def test_connection_to_postgresql_still_works(stores):
    url = stores.database_url.get_secret_value().partition("?")[0]

    async def ask(url):
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval("select sum(n) from generate_series(1, $1::int) n", 100_000)
        finally:
            await connection.close()

    assert asyncio.run(ask(url)) == 5_000_050_000
    with pytest.raises(asyncpg.InvalidPasswordError):
        asyncio.run(ask(url.replace("cotrain:", "cotrain:not")))


def test_prefect_server_sends_no_password_to_an_impostor_on_the_postgresql_port(tmp_path):
    config = load_or_make_config(tmp_path)
    write_environment(tmp_path, config)
    settings = Settings(_env_file=tmp_path / "env", home=tmp_path)
    prefect = next(service for service in make_services(tmp_path, config, settings) if service.name == "prefect")
    make_private_folders(prefect.cwd)
    received, log = bytearray(), tmp_path / "log"
    with listen_on_port(port=config.ports["postgres"]) as impostor, contextlib.ExitStack() as cleanup:
        impostor.settimeout(120)
        listener = cleanup.enter_context(open_listener(prefect.listen))
        output = cleanup.enter_context(log.open("wb"))
        process = cleanup.enter_context(
            subprocess.Popen(
                prefect.command(), env=prefect.env, cwd=prefect.cwd, stdin=listener, stdout=output, stderr=output
            )
        )
        cleanup.callback(process.kill)
        client = cleanup.enter_context(impostor.accept()[0])
        client.settimeout(60)
        assert client.recv(1000) == SSL_REQUEST
        client.sendall(b"N")
        assert b"prefect" in client.recv(1000)
        client.sendall(make_request(CLEARTEXT))
        with contextlib.suppress(ConnectionResetError):
            received += client.recv(1000)
        wait_until(lambda: "must request SCRAM" in log.read_text())
    assert received == b""
