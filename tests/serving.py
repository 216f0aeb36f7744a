"""Serve an application by a real server on a thread."""

import threading
from contextlib import contextmanager

import uvicorn

from tests.waiting import until


@contextmanager
def served(app):
    """The application behind a real server; gives its host and port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join()
