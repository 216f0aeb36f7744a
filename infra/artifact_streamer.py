"""Stream downloads of artifacts from the object store to the client, in front of MLflow.

MLflow fetches a whole object into a temporary file before it sends the first byte, ignores Range, and so needs the
object's size in free disk and minutes of silence for a large one. `ArtifactStreamer` instead asks MLflow for a signed
address of the object, for which MLflow checks the same permission, and forwards the store's response as it arrives.
"""

import json
import re
from typing import Any

import httpx

from infra.request_body import AsgiApp, AsgiMessage, AsgiReceive, AsgiScope, AsgiSend

ARTIFACT_DOWNLOAD_PATTERN = re.compile(r"(/(?:ajax-)?api/2\.0/mlflow-artifacts)/artifacts/(.+)")
STREAM_BLOCK_BYTES = 256 * 1024
STORE_STREAM_TIMEOUT_S = 60.0  # for the store to send the next bytes
NOT_IMPLEMENTED_STATUS = 501  # MLflow's for a store without signed addresses
FORWARDED_RESPONSE_HEADERS = (
    "content-length",
    "content-range",
    "content-type",
    "content-disposition",
    "etag",
    "last-modified",
)


class ArtifactStreamer:
    """Wrap MLflow's ASGI application; all requests but downloads of artifacts pass unchanged."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app
        self._store: httpx.AsyncClient | None = None  # made in the event loop that uses it

    async def __call__(self, scope: AsgiScope, receive: AsgiReceive, send: AsgiSend) -> None:
        match = ARTIFACT_DOWNLOAD_PATTERN.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if match is None or scope["method"] != "GET":
            return await self._app(scope, receive, send)

        status, headers, body = await self._request_address(scope, f"{match[1]}/presigned/{match[2]}")
        if status == NOT_IMPLEMENTED_STATUS:
            return await self._app(scope, receive, send)
        if status != 200:
            await send({"type": "http.response.start", "status": status, "headers": headers})
            return await send({"type": "http.response.body", "body": body})
        await self._stream(str(json.loads(body)["url"]), scope, send)

    async def _request_address(self, scope: AsgiScope, path: str) -> tuple[int, Any, bytes]:
        """Send MLflow the same request for a signed address; return status, headers and body of its response."""
        messages: list[AsgiMessage] = []

        async def collect(message: AsgiMessage) -> None:
            messages.append(message)

        async def receive_nothing() -> AsgiMessage:
            return {"type": "http.request", "body": b"", "more_body": False}

        raw_path = scope.get("raw_path", scope["path"].encode()).replace(b"/artifacts/", b"/presigned/", 1)
        await self._app({**scope, "path": path, "raw_path": raw_path}, receive_nothing, collect)
        body = b"".join(message.get("body", b"") for message in messages[1:])
        return messages[0]["status"], messages[0]["headers"], body

    async def _stream(self, address: str, scope: AsgiScope, send: AsgiSend) -> None:
        """Forward the store's response; a client that stops reading ends the request at the store."""
        if self._store is None:
            self._store = httpx.AsyncClient(timeout=STORE_STREAM_TIMEOUT_S, trust_env=False)
        headers = {"Accept-Encoding": "identity"}
        headers |= {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name == b"range"}
        async with self._store.stream("GET", address, headers=headers) as response:
            forwarded = [
                (name.encode(), response.headers[name].encode("latin-1"))
                for name in FORWARDED_RESPONSE_HEADERS
                if name in response.headers
            ]
            forwarded += [(b"accept-ranges", b"bytes"), (b"x-content-type-options", b"nosniff")]
            await send({"type": "http.response.start", "status": response.status_code, "headers": forwarded})
            async for block in response.aiter_raw(STREAM_BLOCK_BYTES):
                await send({"type": "http.response.body", "body": block, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
