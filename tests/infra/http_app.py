"""Serve a small application with the stack's HTTP protocol: `python -m tests.infra.http_app OPEN_FILES`."""

import asyncio
import resource
import sys

import uvicorn

from infra.http_server import HttpProtocol, make_server_options

HEAD_LIMIT_S = 2.0
LARGE_BYTES = 4 * 1024 * 1024  # more than the kernel's buffers hold for a client that does not read


class QuickProtocol(HttpProtocol):
    """Shorten the protocol's head limit so that a test can wait for it."""

    head_limit_s = HEAD_LIMIT_S


async def app(scope, receive, send):
    """Respond to /early before reading the body and to other paths after it; to /large with `LARGE_BYTES`."""
    if scope["type"] == "websocket":
        return await echo(receive, send)
    assert scope["type"] == "http"
    has_more = scope["path"] != "/early"
    while has_more:
        message = await receive()
        has_more = message.get("more_body", False)
    body = b"x" * LARGE_BYTES if scope["path"] == "/large" else b"ok"
    head = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def echo(receive, send):
    """Send a websocket's messages back."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


async def serve():
    options = {**make_server_options(has_websockets=True), "http": QuickProtocol}
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", **options))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await running


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
    asyncio.run(serve())
