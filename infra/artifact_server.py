"""Requests to a tracking server's artifact API: whole files, parts of uploads, and signed addresses of the store."""

import contextlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx

from infra.mlflow_rules import PART_PARAMETER, UPLOAD_PARAMETER
from infra.store_connections import write_at
from infra.transfer_records import ARTIFACT_PART_BYTES, MAX_ARTIFACT_PARTS, UploadProgress

ARTIFACT_API = "api/2.0/mlflow-artifacts"
TRANSFER_BLOCK_BYTES = 2**20
TRANSFER_TIMEOUT_S = 120.0  # without a byte


class UploadLost(OSError):
    """Report that the store does not have the parts of an upload any more."""


class ArtifactServer:
    """The artifact API of one tracking server, for one account; threads may share it.

    Args:
        url: of the tracking server.
        auth: account and password.

    Raises:
        httpx.HTTPError: from every method, if the server refuses a request or does not answer.
    """

    def __init__(self, url: str, auth: tuple[str, str]) -> None:
        # A connection serves one request, since a file takes far longer than a connection, and none is left open.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(
            base_url=f"{url}/{ARTIFACT_API}/", auth=auth, timeout=TRANSFER_TIMEOUT_S, limits=limits
        )

    def put(self, path: str, data: bytes) -> None:
        """Store a whole file."""
        self._http.put(f"artifacts/{quote(path)}", content=data).raise_for_status()

    def delete(self, path: str) -> None:
        """Delete a file from the artifact store."""
        self._http.delete(f"artifacts/{quote(path)}").raise_for_status()

    def read_size(self, path: str) -> int | None:
        """Return the bytes of a stored file; None if it does not exist."""
        response = self._http.get(f"presigned/{quote(path)}")
        if response.status_code == 404:
            return None
        return int(response.raise_for_status().json()["file_size"])

    def sign_download(self, path: str) -> str:
        """Return a new signed address of a stored file."""
        return str(self._http.get(f"presigned/{quote(path)}").raise_for_status().json()["url"])

    def stream_range(self, path: str, descriptor: int, start: int, end: int) -> None:
        """Fetch the bytes from start to end through the server into the open file, at the same place."""
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with self._http.stream("GET", f"artifacts/{quote(path)}", headers=headers) as response:
            response.raise_for_status()
            if response.status_code != 206:
                raise httpx.RemoteProtocolError(f"{path}: a part must come with status 206, got {response.status_code}")
            for block in response.iter_raw(TRANSFER_BLOCK_BYTES):
                block = block[: end - start]
                write_at(descriptor, memoryview(block), start)
                start += len(block)
        if start != end:
            raise httpx.RemoteProtocolError(f"{path}: {end - start} bytes of a part are missing")

    def create_upload(self, folder: str, name: str, num_bytes: int) -> UploadProgress:
        """Begin an upload in parts, and return its record, which is not on disk yet."""
        part_bytes = max(ARTIFACT_PART_BYTES, -(-num_bytes // MAX_ARTIFACT_PARTS))
        answer = self._post("create", folder, {"path": name, "num_parts": 1})
        return UploadProgress(folder, name, num_bytes, str(answer["upload_id"]), part_bytes)

    def sign_upload(self, progress: UploadProgress) -> list[str]:
        """Return new signed addresses of an upload's parts, in order.

        Raises:
            UploadLost: if the store does not have the upload.
        """
        body = {"path": progress.name, "num_parts": progress.num_parts}
        answer = self._post_to_upload("create", progress, body, {UPLOAD_PARAMETER: progress.upload_id})
        parts = sorted(answer["credentials"], key=lambda part: int(part["part_number"]))
        return [str(part["url"]) for part in parts]

    def stream_part(self, progress: UploadProgress, number: int, data: bytes) -> str:
        """Send one part through the server, and return its ETag."""
        path = f"{progress.folder}/{progress.name}"
        params = {UPLOAD_PARAMETER: progress.upload_id, PART_PARAMETER: str(number)}
        blocks = (data[start : start + TRANSFER_BLOCK_BYTES] for start in range(0, len(data), TRANSFER_BLOCK_BYTES))
        headers = {"Content-Length": str(len(data))}  # sent in blocks, since httpx copies what it sends at once
        response = self._http.put(f"artifacts/{quote(path)}", params=params, content=blocks, headers=headers)
        if response.status_code == 404:
            raise UploadLost(describe_lost_upload(path))
        tag = response.raise_for_status().headers.get("ETag")
        if tag is None:
            raise httpx.RemoteProtocolError(f"{path}: the server must answer a part with its ETag; update the server")
        return str(tag)

    def complete_upload(self, progress: UploadProgress) -> None:
        """Create the object of the parts.

        Raises:
            UploadLost: if the store does not have the upload, or not these parts.
        """
        parts = [{"part_number": number, "etag": progress.parts[number][0]} for number in sorted(progress.parts)]
        body = {"path": progress.name, "upload_id": progress.upload_id, "parts": parts}
        self._post_to_upload("complete", progress, body)

    def has_object(self, progress: UploadProgress) -> bool:
        """Return True if the store has the object that the recorded parts make."""
        tag, path = progress.compute_object_tag(), quote(f"{progress.folder}/{progress.name}")
        if tag is None:
            return False
        with self._http.stream("GET", f"artifacts/{path}", headers={"Range": "bytes=0-0"}) as response:
            return response.is_success and response.headers.get("ETag") == tag

    def abort_upload(self, progress: UploadProgress) -> None:
        """Remove the parts of an upload from the store, if it still knows them."""
        with contextlib.suppress(httpx.HTTPStatusError):
            self._post("abort", progress.folder, {"path": progress.name, "upload_id": progress.upload_id})

    def _post_to_upload(
        self, action: str, progress: UploadProgress, body: Mapping[str, Any], params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        try:
            return self._post(action, progress.folder, body, params)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 404:
                raise
            raise UploadLost(describe_lost_upload(progress.name)) from None

    def _post(
        self, action: str, folder: str, body: Mapping[str, Any], params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        response = self._http.post(f"mpu/{action}/{quote(folder)}", json=body, params=params).raise_for_status()
        return dict(response.json() or {})


def describe_lost_upload(name: str) -> str:
    return f"the parts of {name} that were sent are missing in the store; retry, which sends the file from its start"
