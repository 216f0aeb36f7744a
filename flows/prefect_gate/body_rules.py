"""Validate the JSON of requests and websocket messages to Prefect's server, and the parameters of runs.

The server accepts text, dates and numbers that its database or its own responses then fail on: one such run breaks
every list of runs, one such event the events of all clients that are stored with it. It also expands parameters: from
templates, which it renders in the thread that serves all requests, and from text that it parses as JSON.
"""

import json
import re
from base64 import b64decode
from collections.abc import Mapping
from typing import Any

from flows.allowed_flows import ALLOWED_FLOWS, parse_form
from yuan.data.text import BadJson, find_unstorable, make_printable, parse_json

PREFECT_KIND_KEY = "__prefect_kind"  # marks a value that the server expands
# Fields stored as JSON, whose integers have 64 bits; other numbers are stored in columns of 32 bits, or become dates.
WIDE_INTEGER_FIELDS = frozenset({"parameters", "values", "schema", "parameter_openapi_schema"})
DATE_FIELD_PATTERN = re.compile(
    r"\w+_time|(after|before)_|scheduled_(after|before)|(state_)?timestamp|(history|interval)_(start|end)"
    r"|anchor_date|pause_timeout|(cache_)?expiration|last_polled|since|until|occurred|received|created|updated"
)
DATE_VALUE_PATTERN = re.compile(r"(19[7-9]\d|[2-8]\d{3})-\d\d-\d\d(?!\d).*")
RUN_PARAMETERS_PATH = re.compile(r"/api/deployments/[^/]+/(create_flow_run|schedules/[^/]+)|/api/flow_runs/[^/]+")
SCHEMA_VALIDATION_PATH = "/api/ui/schemas/validate"
EVENTS_PATH = "/api/events"
EVENT_PAGES_PATH = "/api/events/filter/next"
# Limit of one event or other websocket message. The server queues up to 50,000 events, limited only by their number;
# those that the platform and its pages send have less than 8 KiB.
MAX_EVENT_BYTES = 32 * 1024
MAX_PAGE_EVENTS = 50  # as in the lists of the server's pages
MAX_JSON_VALUES = 200_000  # checked within half a second; the client's largest batch of log lines has half as many
_OMITTED = object()


class PrefectInputRefused(ValueError):
    """Report that a client's input must not reach the server; the message says why."""


def parse_request_body(path: str, body: bytes) -> tuple[Any, bytes]:
    """Parse and check a request's body; return its JSON and the body to forward; None and the same bytes if empty.

    Parameters are expanded here as the server would do, as far as its pages need it: they send an object that the form
    has no fields for as `{"__prefect_kind": "json"}`.

    Raises:
        PrefectInputRefused: naming the field and the rule.
    """
    if not body:
        return None, body
    form = _parse_json(body)
    field = (
        "values" if path == SCHEMA_VALIDATION_PATH else "parameters" if RUN_PARAMETERS_PATH.fullmatch(path) else None
    )
    if field is not None and isinstance(form, dict) and field in form:
        try:
            filled = _fill_in_kinds(form[field])
            if filled != form[field]:
                form[field] = {} if filled is _OMITTED else filled
                body = json.dumps(form).encode()
        except RecursionError:
            raise PrefectInputRefused(f"{field} must not be nested so deeply; send fewer levels") from None
    check_values(form)
    if path == EVENTS_PATH and isinstance(form, list):
        for event in form:
            check_size(json.dumps(event))
    if field == "parameters" and isinstance(form, dict):
        check_run_parameters(form)
    return form, body


def check_message(text: str) -> None:
    """Check a websocket's message.

    Raises:
        PrefectInputRefused: naming the field and the rule.
    """
    check_size(text)
    check_values(_parse_json(text))


def check_size(event: str) -> None:
    """Check the size of an event or other websocket message.

    Raises:
        PrefectInputRefused: naming the rule.
    """
    if len(event.encode(errors="replace")) > MAX_EVENT_BYTES:
        raise PrefectInputRefused(
            f"an event or message may have {MAX_EVENT_BYTES} bytes, got {len(event)} characters; send less"
        )


def check_page_token(token: str) -> None:
    """Check the page token with which Prefect's UI fetches the next events: base64 of base64 of the JSON of a filter.

    Raises:
        PrefectInputRefused: naming the rule.
    """
    try:
        form = _parse_json(b64decode(b64decode(token, validate=True), validate=True))
    except ValueError:  # PrefectInputRefused is a subclass
        raise PrefectInputRefused("page-token must be one that the server gave; ask for the first page again") from None
    check_values(form)
    numbers = [form.get(name) for name in ("count", "page_size", "offset")] if isinstance(form, dict) else []
    is_page = len(numbers) == 3 and all(type(number) is int and number >= 0 for number in numbers)
    if not is_page or not 1 <= form["page_size"] <= MAX_PAGE_EVENTS or not isinstance(form.get("filter"), dict):
        raise PrefectInputRefused("page-token must be one that the server gave; ask for the first page again")


def check_run_parameters(form: Mapping[str, Any]) -> None:
    """Check that a body gives a run only the parameters of an allowed flow.

    Raises:
        PrefectInputRefused: if it has others, or turns off the server's own validation.
    """
    if form.get("enforce_parameter_schema") not in (None, True):
        raise PrefectInputRefused(
            "enforce_parameter_schema must be true, since parameters are always checked; leave it out"
        )
    if (parameters := form.get("parameters")) is None:
        return
    faults = []
    for name in ALLOWED_FLOWS:
        try:
            parse_form(name, parameters)
            return
        except ValueError as error:
            faults.append(str(error))
    raise PrefectInputRefused("; or ".join(faults))


def check_values(document: Any) -> None:
    """Check the keys, numbers and dates of a JSON document whose text is already checked.

    Raises:
        PrefectInputRefused: naming the field and the rule.

    >>> check_values({"parameters": {"seed": 2**63 - 1}, "timestamp": "2026-12-01T00:00:00Z"})
    >>> check_values({"level": 2**31})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    flows...PrefectInputRefused: level must be between -2**31 and 2**31, got 2147483648; send a smaller number
    """
    pending: list[tuple[str, Any, int]] = [("the body", document, 31)]  # field name, value, bits of its integers
    while pending:
        name, value, bits = pending.pop()
        if isinstance(value, dict):
            if PREFECT_KIND_KEY in value:
                raise PrefectInputRefused(
                    f"{_shorten(name)} must be a plain value, got one with {PREFECT_KIND_KEY}; send the value itself"
                )
            pending += [(key, item, 63 if key in WIDE_INTEGER_FIELDS else bits) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(name, item, bits) for item in value]
        elif isinstance(value, (int, float)) and not -(2**bits) <= value < 2**bits:
            raise PrefectInputRefused(
                f"{_shorten(name)} must be between -2**{bits} and 2**{bits}, got {_shorten(str(value))}; "
                "send a smaller number"
            )
        if isinstance(value, (str, int, float)) and DATE_FIELD_PATTERN.fullmatch(name) and _is_unsafe_date(value):
            rule = "be between the years 1970 and 8999 and begin with year, month and day, as in 2026-12-01T00:00:00Z"
            raise PrefectInputRefused(f"{_shorten(name)} must {rule}, got {_shorten(str(value))}; send such a date")


def find_unstorable_address(path: str, query: Mapping[str, str]) -> str | None:
    """Describe the part of a URL that the server's database cannot store; None if there is none.

    >>> find_unstorable_address("/api/flows/name/\\0", {})
    'an address must not contain the character U+0000; leave it out'
    """
    for text in (path, *query, *query.values()):
        if fault := find_unstorable(text):
            return f"an address must not contain {fault}; leave it out"
    return None


def _parse_json(data: bytes | str) -> Any:
    try:
        return parse_json(data, MAX_JSON_VALUES)
    except BadJson as error:
        raise PrefectInputRefused(f"{error.place or 'the body'} {error}") from None


def _fill_in_kinds(value: Any) -> Any:
    """Expand values of the kinds `json` and `none` as the server does; values of other kinds are not changed."""
    if isinstance(value, dict):
        kind = value.get(PREFECT_KIND_KEY)
        if kind == "json":
            inner = value.get("value", _OMITTED)
            return _parse_json(inner) if isinstance(inner, str) else inner
        if kind == "none" and "value" in value:
            return _fill_in_kinds(value["value"])
        filled = {key: _fill_in_kinds(item) for key, item in value.items()}
        return {key: item for key, item in filled.items() if item is not _OMITTED}
    if isinstance(value, list):
        return [item for item in map(_fill_in_kinds, value) if item is not _OMITTED]
    return value


def _is_unsafe_date(value: str | float) -> bool:
    """Return True if a date is too far away for the server's calculations, or has another format.

    The server itself accepts more formats, such as week dates and numbers of seconds since 1970.
    """
    return DATE_VALUE_PATTERN.fullmatch(value) is None if isinstance(value, str) else value < 0


def _shorten(text: str) -> str:
    return make_printable(text, 60)
