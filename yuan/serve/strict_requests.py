"""Rules that every request must keep, whatever its route: single headers and parameters, no coded body, strict JSON."""

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Scope

from yuan.data.text import BadJson, make_printable, parse_json

# Two values of one of these are ambiguous: each proxy and server could take another one.
SINGLE_HEADERS = {
    b"authorization": "Authorization",
    b"content-encoding": "Content-Encoding",
    b"content-length": "Content-Length",
    b"content-type": "Content-Type",
    b"idempotency-key": "Idempotency-Key",
}
# A parameter of a media type, whose value may be quoted (RFC 9110, section 5.6.6).
_PARAMETER_PATTERN = re.compile(r';\s*([^=;\s]*)\s*(?:=\s*("(?:[^"\\]|\\.)*"|[^;]*))?')
UTF8_NAMES = ("utf-8", "utf8")
JSON_FAULT_KEY = "yuan.json_fault"  # in the scope of a request


@dataclass(frozen=True)
class RequestFault:
    """Describe what a request's head does that no route supports.

    Attributes:
        status: HTTP status of the refusal.
        message: the rule and what to do.
        param: the header or query parameter, or `path`.
    """

    status: int
    message: str
    param: str


def find_request_fault(scope: Scope) -> RequestFault | None:
    """Return the first fault of a request's path, headers and query; None if there is none."""
    if "\n" in scope["path"]:  # Starlette's patterns ignore it at the end, and match it nowhere else
        return RequestFault(422, "the path must not have a line end; remove %0A", "path")
    values: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name not in SINGLE_HEADERS:
            continue
        if name in values:
            return RequestFault(422, "the header may occur once; send one", SINGLE_HEADERS[name])
        values[name] = value
    return (
        _find_encoding_fault(values.get(b"content-encoding", b"").decode("latin-1"))
        or _find_charset_fault(values.get(b"content-type", b"").decode("latin-1"))
        or _find_repeated_parameter(scope["query_string"])
    )


def _find_encoding_fault(encoding: str) -> RequestFault | None:
    if {coding.strip().lower() for coding in encoding.split(",")} <= {"", "identity"}:
        return None
    shown = make_printable(encoding)
    return RequestFault(415, f"the body must not be compressed, got {shown}; send it as it is", "Content-Encoding")


def _find_charset_fault(content_type: str) -> RequestFault | None:
    for name, value in _PARAMETER_PATTERN.findall(content_type):
        charset = value.strip().strip('"')
        if name.lower() == "charset" and charset.lower() not in UTF8_NAMES:
            shown = make_printable(charset) or "no name"
            return RequestFault(
                415, f"the charset must be utf-8, got {shown}; encode the body in UTF-8", "Content-Type"
            )
    return None


def _find_repeated_parameter(query: bytes) -> RequestFault | None:
    if b"&" not in query:
        return None
    seen = set()
    for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name in seen:
            return RequestFault(422, "the query parameter may occur once; send one", make_printable(name) or "query")
        seen.add(name)
    return None


class StrictRequest(Request):
    """A request whose JSON body is parsed by `yuan.data.text.parse_json`; a byte order mark of UTF-8 is left out.

    A body that is not JSON counts as missing until `get_json_fault` is asked for the reason: FastAPI parses a body
    before it authenticates the caller, to whom an error raised here would be reported first.
    """

    async def json(self) -> Any:
        try:
            return parse_json(await self.body(), keep_written=True)
        except BadJson as error:
            self.scope[JSON_FAULT_KEY] = error
            return None


def get_json_fault(request: Request) -> BadJson | None:
    """Return why the body of a request is not JSON; None if it is, or if it was not parsed."""
    return request.scope.get(JSON_FAULT_KEY)


def get_body_type(request: Request) -> Any:
    """Return the type of the body of a request's route; None if it takes no body of JSON."""
    params = request.scope["route"].dependant.body_params
    return params[0].field_info.annotation if params else None


class StrictRoute(APIRoute):
    """A route that parses its requests as `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle_strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle_strict
