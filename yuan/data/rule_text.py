"""Validation errors in the platform's own words: the field, its rule, the value, and what to do."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from yuan.config import suggest_nearest_name
from yuan.data.text import make_printable

MAX_DESCRIBED_ERRORS = 3
MAX_DESCRIBED_VALUE_CHARS = 40
MAX_DESCRIBED_INTEGER = 10**MAX_DESCRIBED_VALUE_CHARS

_PYDANTIC_SUBJECT_PATTERN = re.compile(r"^[A-Z][A-Za-z]+ should")  # "Input should", "String should", "List should"
# The rule of each type of pydantic's errors, with the values of its `ctx`; {got} is the value, if it is short.
# https://docs.pydantic.dev/latest/errors/validation_errors/
_OBJECT_RULE = "must be a JSON object{got}; write it in braces"
_INTEGER_RULE = "must be an integer{got}; write digits alone"
_NUMBER_RULE = "must be a number{got}; write one such as 0.5"
_BOOLEAN_RULE = "must be true or false{got}; write one of them"
_LIST_RULE = "must be a list{got}; write it in brackets"
_CHOICE_RULE = "must be {expected}{got}; choose one"
_RULE_BY_TYPE = {
    "missing": "is missing; add it",
    "json_invalid": "must be JSON; correct it",
    "dict_type": _OBJECT_RULE,
    "model_type": _OBJECT_RULE,
    "model_attributes_type": _OBJECT_RULE,
    "dataclass_type": _OBJECT_RULE,
    "union_tag_not_found": "must have the key {discriminator}; add it",
    "union_tag_invalid": "{discriminator} must be one of {expected_tags}, got {tag}; choose one",
    "enum": _CHOICE_RULE,
    "literal_error": _CHOICE_RULE,
    "list_type": _LIST_RULE,
    "tuple_type": _LIST_RULE,
    "too_short": "must have at least {min_length} {items}, got {actual_length}; add some",
    "too_long": "must have at most {max_length} {items}; send fewer",
    "string_type": "must be text{got}; write it in quotes",
    "string_too_short": "must have at least {min_length} {characters}; write more",
    "string_too_long": "must have at most {max_length} {characters}; shorten it",
    "bool_type": _BOOLEAN_RULE,
    "bool_parsing": _BOOLEAN_RULE,
    "int_type": _INTEGER_RULE,
    "int_parsing": _INTEGER_RULE,
    "int_parsing_size": _INTEGER_RULE,
    "int_from_float": _INTEGER_RULE,
    "float_type": _NUMBER_RULE,
    "float_parsing": _NUMBER_RULE,
    "decimal_type": _NUMBER_RULE,
    "decimal_parsing": _NUMBER_RULE,
    "finite_number": "must be a finite number{got}; correct it",
    "greater_than": "must be greater than {gt}{got}; raise it",
    "greater_than_equal": "must be greater than or equal to {ge}{got}; raise it",
    "less_than": "must be less than {lt}{got}; lower it",
    "less_than_equal": "must be less than or equal to {le}{got}; lower it",
    "decimal_max_digits": "must have at most {max_digits} digits; shorten it",
    "decimal_max_places": "must have at most {decimal_places} digits after the decimal point{got}; round it",
    "decimal_whole_digits": "must have at most {whole_digits} digits before the decimal point{got}; lower it",
}


def describe_errors(error: ValidationError, form: Any = None, name_place: Callable[[str], str] = str) -> str:
    """Format a validation error as one printable line: field and rule of the first three entries.

    Args:
        form: the type that was validated, to suggest its names for unknown ones.
        name_place: returns how the dotted path of a field is shown.
    """
    entries = error.errors(include_url=False)[:MAX_DESCRIBED_ERRORS]
    return "; ".join(
        f"{make_printable(name_place(get_field_path(entry))) or 'line'}: {make_printable(describe_rule(entry, form))}"
        for entry in entries
    )


def describe_rule(entry: Any, form: Any = None) -> str:
    """Return the rule of an entry of `ValidationError.errors()` in the words of the platform's own errors.

    Args:
        form: the type that was validated, if the place of the entry begins at it.

    >>> describe_rule({"type": "missing", "msg": "Field required"})
    'is missing; add it'
    >>> describe_rule({"type": "less_than_equal", "ctx": {"le": 5}, "input": 7})
    'must be less than or equal to 5, got 7; lower it'
    >>> describe_rule({"type": "value_error", "msg": "Value error, there is no such day"})
    'there is no such day'
    """
    if entry["type"] == "extra_forbidden":
        *place, name = entry["loc"]
        known_names = find_field_names(form, place)
        advice = f"use one of {', '.join(known_names)}, or leave it out" if known_names else "leave it out"
        return f"is unknown; {suggest_nearest_name(str(name), known_names) or advice}"
    rule = _RULE_BY_TYPE.get(entry["type"])
    if rule is None:
        return _PYDANTIC_SUBJECT_PATTERN.sub("must", str(entry["msg"]).removeprefix("Value error, "), count=1)
    if entry.get("input", rule) is None and "{got}" in rule:
        return _describe_null_rule(rule, entry.get("loc", ()), form)
    values = entry.get("ctx", {})
    length = values.get("min_length", values.get("max_length"))
    return rule.format(
        **{name: make_printable(str(value)) for name, value in values.items()},
        got=_describe_value(entry.get("input")),
        items="item" if length == 1 else "items",
        characters="character" if length == 1 else "characters",
    )


def _describe_null_rule(rule: str, place: Sequence[str | int], form: Any) -> str:
    """Return the rule of a value that is null, which many programs write for a key without a value."""
    kind = rule.removeprefix("must be ").partition("{got}")[0]
    fields = [inner.model_fields.get(str(place[-1])) for inner in _find_forms(form, place[:-1])] if place else []
    if place and isinstance(place[-1], int):
        advice = f"remove the item, or give {kind}"
    elif any(field is not None and not field.is_required() for field in fields):
        advice = f"leave the key out, or give {kind}"
    else:
        advice = f"give {kind}"
    return f"must be {kind}, got null; {advice}"


def _describe_value(value: object) -> str:
    """Return ", got" and a short value; empty for a long one, and for one that an error does not hold."""
    if isinstance(value, (dict, list)):
        return ", got an object" if isinstance(value, dict) else ", got a list"
    if isinstance(value, bool):
        return f", got {str(value).lower()}"
    if not isinstance(value, (str, int, float)) or (isinstance(value, int) and abs(value) > MAX_DESCRIBED_INTEGER):
        return ""
    shown = str(value)
    if len(shown) > MAX_DESCRIBED_VALUE_CHARS:
        return ""
    shown = make_printable(shown)
    return f", got '{shown}'" if isinstance(value, str) else f", got {shown}"


def find_field_names(form: Any, place: Iterable[str | int]) -> list[str]:
    """Return the names of the fields at a place of a form, of all types that its value may have there."""
    return list(dict.fromkeys(name for inner in _find_forms(form, place) for name in inner.model_fields))


def _find_forms(form: Any, place: Iterable[str | int]) -> list[type[BaseModel]]:
    forms = _list_forms(form)
    for part in place:
        fields = [form.model_fields[part] for form in forms if isinstance(part, str) and part in form.model_fields]
        if fields:
            # A rule of a field may have a form of its own, as that of a recipe's overrides.
            forms = [inner for field in fields for inner in _list_forms(field.annotation)]
            forms += [rule.form for field in fields for rule in field.metadata if hasattr(rule, "form")]
        elif isinstance(part, str):  # the tag of a union
            forms = [
                form for form in forms if "type" in form.model_fields and form.model_fields["type"].default == part
            ]
    return forms


def _list_forms(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [form for argument in get_args(annotation) for form in _list_forms(argument)]


def get_field_path(error: Any) -> str:
    """Return the dotted field path of an entry of `ValidationError.errors()`; empty for the whole document."""
    param = error.get("ctx", {}).get("param")
    return ".".join(str(part) for part in (*error["loc"], *([param] if param else ())))
