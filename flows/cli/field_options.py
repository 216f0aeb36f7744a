"""Options of a command made from the fields of a pydantic model, so that each field is written once."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flows.cli.output import name_option

Command = TypeVar("Command", bound=Callable[..., Any])


def add_field_options(model: type[BaseModel], exclude: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Give a command one option for each field of a model; the command takes them as `**fields`.

    Name, type, default and help come from the field. A field that is a mapping is an option `NAME=NUMBER` that may be
    repeated; `parse_fields` puts it together again.

    Args:
        exclude: fields for which the command has options of its own.
    """

    def decorate(command: Command) -> Command:
        parameters = inspect.signature(command).parameters.values()
        named_parameters = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        options = [_make_option(name, field) for name, field in model.model_fields.items() if name not in exclude]
        command.__signature__ = inspect.Signature([*options, *named_parameters])  # type: ignore[attr-defined]
        return command

    return decorate


def parse_fields(model: type[BaseModel], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's options as the model's fields, without mappings that were not given.

    Raises:
        BadParameter: if a part of a mapping is not `NAME=NUMBER`, or names what another one names: exit status 2.
    """
    mappings = {name for name, field in model.model_fields.items() if _is_mapping(field)}
    return {
        name: _parse_mapping(name, value) if name in mappings else value
        for name, value in fields.items()
        if name not in mappings or value
    }


def _make_option(name: str, field: FieldInfo) -> inspect.Parameter:
    option_type, metadata = _split_annotation(field)
    help_text = f"{field.description}{_describe_bounds(metadata)}"
    if _is_mapping(field):
        option_type = list[str] | None
        help_text += "; NAME=NUMBER, may be repeated"
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=field.default,
        annotation=Annotated[option_type, typer.Option(help=help_text)],
    )


def _split_annotation(field: FieldInfo) -> tuple[Any, Sequence[Any]]:
    """Return a field's type without its rules, and the rules; those of `Annotated[T, rule] | None` count too."""
    members = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else ()
    for member in members:
        if get_origin(member) is Annotated:
            bare_type, *rules = get_args(member)
            metadata = [part for rule in rules for part in (rule.metadata if isinstance(rule, FieldInfo) else [rule])]
            return bare_type | None, metadata
    return field.annotation, field.metadata


def _is_mapping(field: FieldInfo) -> bool:
    """Return True if the field's type is a dictionary, or a union with one."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    member_types = get_args(field.annotation) if is_union else (field.annotation,)
    return any(get_origin(member_type) is dict for member_type in member_types)


def _describe_bounds(metadata: Sequence[Any]) -> str:
    """Return the bounds of a number in words.

    >>> from feedback.contracts import RoundParameters
    >>> fields = RoundParameters.model_fields
    >>> _describe_bounds(_split_annotation(fields["max_steps"])[1]), _describe_bounds(fields["priority"].metadata)
    (', 1 to 1,000,000', ', -100 to 100')
    >>> _describe_bounds(_split_annotation(fields["learning_rate"])[1]), _describe_bounds([])
    (', above 0 and below 1', '')
    """
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = {name: getattr(part, name) for part in metadata for name in words if hasattr(part, name)}
    if {"ge", "le"} <= bounds.keys():
        return f", {bounds['ge']:,} to {bounds['le']:,}"
    named = [f"{word} {bounds[name]:,}" for name, word in words.items() if name in bounds]
    return f", {' and '.join(named)}" if named else ""


def _parse_mapping(name: str, parts: Sequence[str]) -> dict[str, float]:
    option: Any = [name_option(name)]
    numbers: dict[str, float] = {}
    for part in parts:
        key, _, number = part.partition("=")
        if key in numbers:
            raise typer.BadParameter(f"must name each part once, got {key[:60]!r} twice", param_hint=option)
        try:
            numbers[key] = float(number)
        except ValueError:
            raise typer.BadParameter(f"must be NAME=NUMBER, got {part[:60]!r}", param_hint=option) from None
    return numbers
