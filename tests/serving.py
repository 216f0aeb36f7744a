"""Serve an application with a real server in a thread."""

import threading
from contextlib import contextmanager

import uvicorn

from infra.http_server import make_server_options
from tests.waiting import wait_until


@contextmanager
def serve_app(app):
    """Run the application behind a real server while the block runs; yield its URL."""
    options = {"timeout_keep_alive": 60, **make_server_options()}  # longer than clients keep connections, as in service
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
