"""Check the bounds of requests to MLflow: JSON bodies, query parameters and GraphQL.

MLflow itself limits little: it makes a join for every entry of `order_by` and for every condition of a filter, checks a
GraphQL query in time quadratic in its fields, and responds with 500 to malformed JSON.
"""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

MAX_ORDER_BY_ENTRIES = 10
MAX_FILTER_CONDITIONS = 30  # of a filter
MAX_JSON_ENTRIES = 1_000  # of any other list or object
MAX_STRING_CHARACTERS = 10_000  # of a string
MAX_RESULTS = 25_000  # the client library requests this number of metric points at a time
MAX_JSON_DEPTH = 20
MAX_GRAPHQL_CHARACTERS = 4_096  # of a GraphQL query; those of MLflow's pages have at most 1,500
MAX_GRAPHQL_TOKENS = 1_000
MAX_GRAPHQL_FIELDS = 200
MAX_GRAPHQL_ALIASES = 10


class MlflowRequestRefused(ValueError):
    """Report that a request is malformed or exceeds a bound."""


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse a body that is a JSON object; an empty body is an empty object, as for MLflow.

    Raises:
        MlflowRequestRefused: if it is anything else.

    >>> parse_json_object(b'{"a": 1}'), parse_json_object(b"")
    ({'a': 1}, {})
    """
    try:
        payload = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        raise MlflowRequestRefused("the body must be JSON; send one object") from None
    if not isinstance(payload, dict):
        raise MlflowRequestRefused(f"the body must be a JSON object, got {type(payload).__name__}; send one object")
    return payload


def check_json_bounds(form: dict[str, Any]) -> None:
    """Check an object's lists, strings and numbers against the bounds, at every depth.

    Raises:
        MlflowRequestRefused: naming the first that exceeds a bound.
    """
    stack: list[tuple[str, Any, int]] = [
        ("the body", form, 0)
    ]  # name, value, depth; no recursion, so no RecursionError
    while stack:
        name, value, depth = stack.pop()
        if depth > MAX_JSON_DEPTH:
            raise MlflowRequestRefused(f"JSON may be {MAX_JSON_DEPTH} levels deep; reduce the nesting")
        if isinstance(value, (dict, list)):
            _check_count(name, len(value))
            entries = value.items() if isinstance(value, dict) else ((name, entry) for entry in value)
            stack += [(key, entry, depth + 1) for key, entry in entries]
        _check_scalar(name, value)


def check_query_parameters(query_string: bytes) -> None:
    """Check a URL's query parameters against the same bounds.

    Raises:
        MlflowRequestRefused: naming the first that exceeds a bound.
    """
    try:
        pairs = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_JSON_ENTRIES)
    except ValueError:
        raise MlflowRequestRefused(f"a URL may have {MAX_JSON_ENTRIES} parameters; request less") from None
    names = [name for name, _ in pairs]
    for name, text in pairs:
        _check_count(name, names.count(name) if _normalize_name(name) == "orderby" else 1)
        _check_scalar(name, text)


def check_graphql(form: dict[str, Any]) -> None:
    """Check a GraphQL request's keys, and limit its query to a size that MLflow checks within milliseconds.

    Raises:
        MlflowRequestRefused: naming the fault.
    """
    # A dependency of MLflow, imported here because it is slow to import and the keeper imports this module.
    from graphql import GraphQLError, parse

    query, variables, name = (form.get(key) for key in ("query", "variables", "operationName"))
    if not isinstance(query, str) or not 0 < len(query) <= MAX_GRAPHQL_CHARACTERS:
        raise MlflowRequestRefused(
            f"query must be a string of at most {MAX_GRAPHQL_CHARACTERS} characters; see MLflow's schema"
        )
    if not isinstance(variables, (dict, type(None))) or not isinstance(name, (str, type(None))):
        raise MlflowRequestRefused(
            "variables must be an object and operationName a string; leave them out or send these"
        )
    try:
        document = parse(query, no_location=True, max_tokens=MAX_GRAPHQL_TOKENS)
    except GraphQLError as error:
        raise MlflowRequestRefused(f"query is not valid GraphQL: {error.message[:200]}") from None
    except RecursionError:
        raise MlflowRequestRefused("query is nested too deeply; reduce the nesting") from None

    nodes = list(_walk_nodes(document))
    fields = [node for node in nodes if node.kind == "field"]
    if len(fields) > MAX_GRAPHQL_FIELDS or sum(node.alias is not None for node in fields) > MAX_GRAPHQL_ALIASES:
        raise MlflowRequestRefused(
            f"a query may have {MAX_GRAPHQL_FIELDS} fields and {MAX_GRAPHQL_ALIASES} aliases; request less"
        )
    for node in nodes:
        if node.kind == "object_field":
            _check_argument(node.name.value, node.value)


def _check_argument(name: str, value: Any) -> None:
    """Check a GraphQL argument against the bounds; it must be a literal, since variables can have any name."""
    if _normalize_name(name) in ("orderby", "maxresults", "filter") and value.kind == "variable":
        raise MlflowRequestRefused(f"{name} must be a literal in the query, or the whole input one variable")
    if value.kind == "list_value":
        _check_count(name, len(value.values))
    elif value.kind in ("int_value", "string_value"):
        _check_scalar(name, value.value)


def _walk_nodes(root: Any) -> Iterator[Any]:
    """Yield every node of a syntax tree, without recursion."""
    stack = [(root, 0)]  # node, depth
    while stack:
        node, depth = stack.pop()
        if depth > 4 * MAX_JSON_DEPTH:
            raise MlflowRequestRefused("query is nested too deeply; reduce the nesting")
        yield node
        for key in node.keys:
            child = getattr(node, key)
            children = child if isinstance(child, (list, tuple)) else [child]
            stack += [(entry, depth + 1) for entry in children if hasattr(entry, "kind")]


def _normalize_name(name: str) -> str:
    """Normalize a field's name, since protobuf accepts both `order_by` and `orderBy`."""
    return name.replace("_", "").lower()


def _check_count(name: str, count: int) -> None:
    limit = MAX_ORDER_BY_ENTRIES if _normalize_name(name) == "orderby" else MAX_JSON_ENTRIES
    if count > limit:
        raise MlflowRequestRefused(f"{name[:100]} may have {limit} entries, got {count}; send less")


def _check_scalar(name: str, value: Any) -> None:
    if _normalize_name(name) == "maxresults" and _is_over_limit(value, MAX_RESULTS):
        raise MlflowRequestRefused(f"{name} may be {MAX_RESULTS}; request less, then the next page")
    if not isinstance(value, str):
        return
    if len(value) > MAX_STRING_CHARACTERS:
        raise MlflowRequestRefused(
            f"{name[:100]} may have {MAX_STRING_CHARACTERS} characters, got {len(value)}; send less"
        )
    if (
        _normalize_name(name) in ("filter", "filterstring")
        and len(re.findall(r"\band\b", value, re.I)) >= MAX_FILTER_CONDITIONS
    ):
        raise MlflowRequestRefused(f"{name} may have {MAX_FILTER_CONDITIONS} conditions; request less")


def _is_over_limit(value: Any, limit: int) -> bool:
    """Return True if a number, or a string that protobuf parses as one, exceeds a limit."""
    try:
        return float(value) > limit
    except (TypeError, ValueError, OverflowError):
        return isinstance(value, int)  # an integer too large for a float; MLflow itself refuses other types
