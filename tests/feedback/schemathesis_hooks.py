"""Hooks for schemathesis beyond the OpenAPI description: the JSONL format, and the registered version."""

import json

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def write_lines(context, value):
    """Serialize each item of a list as a line, anything else as one line."""
    rows = value if isinstance(value, list) else [value]
    return b"\n".join(json.dumps(row).encode() for row in rows)


@schemathesis.hook.apply_to(method="POST", path="/api/v1/feedback")
def map_body(context, body):
    """Set the registered version in every report that names a valid version number."""
    version = body.get("model_version") if isinstance(body, dict) else None
    if type(version) is int and 1 <= version < 2**31:
        return {**body, "model_version": 1}
    return body
