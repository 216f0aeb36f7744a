"""What schemathesis must know beside the OpenAPI description: how rows travel, and which version there is."""

import json

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def write_lines(context, value):
    """Each item of a list is a line; anything else is one line."""
    rows = value if isinstance(value, list) else [value]
    return b"\n".join(json.dumps(row).encode() for row in rows)


@schemathesis.hook.apply_to(method="POST", path="/api/v1/feedback")
def map_body(context, body):
    """Let every report that could be about some version be about the one that is registered."""
    version = body.get("model_version") if isinstance(body, dict) else None
    if type(version) is int and 1 <= version < 2**31:
        return {**body, "model_version": 1}
    return body
