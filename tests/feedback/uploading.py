"""Helpers for uploads in parts: files of rows, and a portal with its store."""

import hashlib
import json

import httpx

PART_BYTES = 16 * 2**20


def write_rows(file, num_bytes, prefix="p", text="x" * 1000):
    """Write rows of about a kilobyte until the file has at least this size; return their number."""
    number = 0
    with file.open("wb") as stream:
        while stream.tell() < num_bytes:
            stream.write(json.dumps({"prompt": f"{prefix}{number}", "answer": text}).encode() + b"\n")
            number += 1
    return number


def begin(portal, headers, data, name="rows", sha256=None, **changes):
    """Begin an upload of the bytes; return the response."""
    form = {"name": name, "num_bytes": len(data), "sha256": sha256 or hashlib.sha256(data).hexdigest(), **changes}
    return portal.post("/api/v1/datasets/uploads", json=form, headers=headers)


def cut(data):
    return [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]


def presign(portal, headers, dataset_id, parts):
    """Return the addresses of parts, given as bytes by number."""
    body = {"parts": [{"number": number, "sha256": hashlib.sha256(part).hexdigest()} for number, part in parts.items()]}
    return portal.post(f"/api/v1/datasets/uploads/{dataset_id}/parts", json=body, headers=headers)


def put(address, content):
    return httpx.put(address["url"], headers=address["headers"], content=content, timeout=60)


def send(portal, headers, dataset_id, parts):
    """Send parts, given as bytes by number, to the store."""
    for address in presign(portal, headers, dataset_id, parts).json()["parts"]:
        assert put(address, parts[address["number"]]).status_code == 200


def complete(portal, headers, dataset_id):
    return portal.post(f"/api/v1/datasets/uploads/{dataset_id}/complete", headers=headers)
