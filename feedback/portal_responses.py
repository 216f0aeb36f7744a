"""Parse the portal's responses for its client; whatever else answers at its address becomes an error that says so."""

from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from feedback.contracts import ErrorBody, ErrorOut
from yuan.data.rule_text import describe_errors
from yuan.data.text import make_printable

ResponseModel = TypeVar("ResponseModel", bound=BaseModel)
Parsed = TypeVar("Parsed")
MAX_SHOWN_RESPONSE_CHARACTERS = 100
MAX_SHOWN_ROWS = 3
MAX_REASON_CHARACTERS = 300
UNUSABLE_RESPONSE = "unusable"  # type of the error for a response that is not a portal's
NO_ROUTE = "http"  # the portal's type of error for a path that it does not have, with status 404


class PortalError(Exception):
    """The portal refused a request, or the response is not that of a portal.

    Attributes:
        status: the HTTP status.
        body: the reason: message, type, and where there are any the field and the malformed rows. The type is
            `UNUSABLE_RESPONSE` for the response of a server that is no portal.
    """

    def __init__(self, status: int, body: ErrorBody) -> None:
        field = f" ({body.param})" if body.param else ""
        rows = body.rows or []
        shown = "".join(f"; row {row.row}: {row.reason}" for row in rows[:MAX_SHOWN_ROWS])
        more = f"; and {len(rows) - MAX_SHOWN_ROWS} more in body.rows" if len(rows) > MAX_SHOWN_ROWS else ""
        super().__init__(f"{status}: {body.message}{field}{shown}{more}")
        self.status, self.body = status, body


def parse_response(response: httpx.Response, adapter: TypeAdapter[Parsed]) -> Parsed:
    """Parse a response.

    Raises:
        PortalError: if it is not JSON of the expected form, as from a server that is no portal.
    """
    try:
        return adapter.validate_json(response.content)
    except ValidationError as error:
        raise make_unusable_error(response, _describe_form(error)) from None


def parse_response_list(response: httpx.Response, model: type[ResponseModel]) -> list[ResponseModel]:
    try:
        return [model.model_validate(item) for item in parse_response(response, TypeAdapter(list[Any]))]
    except ValidationError as error:
        raise make_unusable_error(response, _describe_form(error)) from None


def _describe_form(error: ValidationError) -> str:
    is_json = all(entry["type"] != "json_invalid" for entry in error.errors(include_url=False, include_input=False))
    return f"its fields are others ({describe_errors(error)})" if is_json else "it is not JSON"


def make_refusal(response: httpx.Response) -> PortalError:
    """Make the error of a response that is no success; one without a portal's error body is not that of a portal."""
    try:
        body = ErrorOut.model_validate_json(response.content).error
    except ValidationError:
        return make_unusable_error(response, "it has no error object")
    if response.status_code == 404 and body.type == NO_ROUTE:
        return make_unusable_error(response, f"it has no route {response.request.url.path}")
    return PortalError(response.status_code, body)


def make_unusable_error(response: httpx.Response, reason: str) -> PortalError:
    """Make the error of a response that is not that of a portal, with the facts that show what answered."""
    url, content_type = response.request.url, response.headers.get("Content-Type", "")
    text = response.content[: 4 * MAX_SHOWN_RESPONSE_CHARACTERS].decode(errors="replace")
    facts = [f"status {response.status_code}", content_type.partition(";")[0] or "no content type"]
    if "Location" in response.headers:
        facts.append(f"redirects to {response.headers['Location'][:MAX_SHOWN_RESPONSE_CHARACTERS]}")
    facts.append(f"begins with {text[:MAX_SHOWN_RESPONSE_CHARACTERS]!r}" if text.strip() else "empty")
    message = (
        f"the response of {url.scheme}://{url.netloc.decode()} is not that of a portal: "
        f"{make_printable(reason, MAX_REASON_CHARACTERS)} ({make_printable(', '.join(facts), MAX_REASON_CHARACTERS)}); "
        "check the address, which is the portal's without /api/v1 or /v1"
    )
    return PortalError(response.status_code, ErrorBody(message=message, type=UNUSABLE_RESPONSE))
