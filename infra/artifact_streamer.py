"""Stream artifacts between the object store and the client, in front of MLflow.

MLflow fetches a whole object into a temporary file before it sends the first byte, ignores Range, and so needs the
object's size in free disk and minutes of silence for a large one. `ArtifactStreamer` instead asks MLflow for a signed
address of the object, for which MLflow checks the same permission, and forwards the store's response as it arrives.
Parts of an upload are forwarded to the store in the same way; a whole file that is uploaded passes to MLflow.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl, urlencode

import httpx

from infra.mlflow_rules import PART_PARAMETER, UPLOAD_PARAMETER
from infra.request_body import (
    AsgiApp,
    AsgiHeaders,
    AsgiMessage,
    AsgiReceive,
    AsgiScope,
    AsgiSend,
    ClientDisconnected,
)

ARTIFACT_DOWNLOAD_PATTERN = re.compile(r"(/(?:ajax-)?api/2\.0/mlflow-artifacts)/artifacts/(.+)")
STREAM_BLOCK_BYTES = 256 * 1024
STORE_STREAM_TIMEOUT_S = 60.0  # for the store, or the client, to send or take the next bytes
LENGTH_REQUIRED_STATUS = 411
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
    """Wrap MLflow's ASGI application; all requests but downloads of artifacts and parts of uploads pass unchanged."""

    def __init__(self, app: AsgiApp) -> None:
        self._app = app
        self._store: httpx.AsyncClient | None = None  # made in the event loop that uses it

    async def __call__(self, scope: AsgiScope, receive: AsgiReceive, send: AsgiSend) -> None:
        match = ARTIFACT_DOWNLOAD_PATTERN.fullmatch(scope["path"]) if scope["type"] == "http" else None
        parameters = dict(parse_qsl(scope["query_string"].decode("latin-1"))) if match is not None else {}
        if match is not None and scope["method"] == "GET":
            await self._send_object(match, scope, receive, send)
        elif match is not None and scope["method"] == "PUT" and UPLOAD_PARAMETER in parameters:
            await self._store_part(match, parameters, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _send_object(self, match: re.Match[str], scope: AsgiScope, receive: AsgiReceive, send: AsgiSend) -> None:
        raw_path = _get_raw_path(scope).replace(b"/artifacts/", b"/presigned/", 1)
        path = f"{match[1]}/presigned/{match[2]}"
        status, headers, body = await self._request({**scope, "path": path, "raw_path": raw_path}, b"")
        if status == NOT_IMPLEMENTED_STATUS:
            await self._app(scope, receive, send)
        elif status != 200:
            await _respond(send, status, headers, body)
        else:
            await self._stream(str(json.loads(body)["url"]), scope, send)

    async def _store_part(
        self, match: re.Match[str], parameters: dict[str, str], scope: AsgiScope, receive: AsgiReceive, send: AsgiSend
    ) -> None:
        """Ask MLflow for the address of a part, forward the body to it, and respond with the store's ETag."""
        folder, _, name = match[2].rpartition("/")
        raw_folder = _get_raw_path(scope).replace(b"/artifacts/", b"/mpu/create/", 1).rpartition(b"/")[0]
        upload = {name: parameters.get(name, "") for name in (UPLOAD_PARAMETER, PART_PARAMETER)}
        body = json.dumps({"path": name, "num_parts": 1}).encode()
        headers = [header for header in scope["headers"] if header[0] not in _BODY_HEADERS]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        request = {"path": f"{match[1]}/mpu/create/{folder}", "raw_path": raw_folder, "method": "POST"}
        request |= {"query_string": urlencode(upload).encode(), "headers": headers}
        status, headers, answer = await self._request({**scope, **request}, body)
        if status != 200:
            return await _respond(send, status, headers, answer)

        num_bytes = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not num_bytes:
            return await _respond(send, LENGTH_REQUIRED_STATUS, [], b"")
        address = str(json.loads(answer)["credentials"][0]["url"])
        response = await self._get_store().put(
            address, content=_read_blocks(receive), headers={"Content-Length": num_bytes}
        )
        tag = [(b"etag", response.headers["etag"].encode("latin-1"))] if "etag" in response.headers else []
        await _respond(send, response.status_code, tag, b"")

    async def _request(self, scope: AsgiScope, body: bytes) -> tuple[int, Any, bytes]:
        """Send MLflow a request; return status, headers and body of its response."""
        messages: list[AsgiMessage] = []

        async def collect(message: AsgiMessage) -> None:
            messages.append(message)

        async def receive_body() -> AsgiMessage:
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_body, collect)
        answer = b"".join(message.get("body", b"") for message in messages[1:])
        return messages[0]["status"], messages[0]["headers"], answer

    def _get_store(self) -> httpx.AsyncClient:
        if self._store is None:
            self._store = httpx.AsyncClient(timeout=STORE_STREAM_TIMEOUT_S, trust_env=False)
        return self._store

    async def _stream(self, address: str, scope: AsgiScope, send: AsgiSend) -> None:
        """Forward the store's response; a client that stops reading ends the request at the store."""
        headers = {"Accept-Encoding": "identity"}
        headers |= {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name == b"range"}
        async with self._get_store().stream("GET", address, headers=headers) as response:
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


_BODY_HEADERS = (b"content-length", b"content-type", b"transfer-encoding", b"expect")


def _get_raw_path(scope: AsgiScope) -> bytes:
    return bytes(scope.get("raw_path") or scope["path"].encode())


async def _respond(send: AsgiSend, status: int, headers: AsgiHeaders, body: bytes) -> None:
    if not body:
        headers = [*(header for header in headers if header[0] != b"content-length"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _read_blocks(receive: AsgiReceive) -> AsyncIterator[bytes]:
    """Yield a request's body as it arrives.

    Raises:
        ClientDisconnected: if the client disconnects, or sends nothing for STORE_STREAM_TIMEOUT_S.
    """
    while True:
        try:
            async with asyncio.timeout(STORE_STREAM_TIMEOUT_S):
                message = await receive()
        except TimeoutError:
            raise ClientDisconnected from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        if body := message.get("body"):
            yield body
        if not message.get("more_body", False):
            return
