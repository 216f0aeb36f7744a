"""Command output: one JSON object on stdout with --json, readable lines otherwise; errors in one line on stderr."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from feedback.portal_responses import PortalError
from flows.cli.error_lines import USAGE_ERROR, describe_failure, describe_usage_error
from yuan.config import FieldError
from yuan.data.rule_text import describe_errors, describe_rule
from yuan.data.text import BLANK_TEXT, BadJson, find_unstorable, is_blank, make_printable, parse_json
from yuan.version_names import is_version_number, parse_version_number

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C
OPTIONS_OF_FIELDS = {"overrides": "--set"}  # of fields whose option has another name
MAX_LINE_CHARACTERS = 1000
PROGRESS_INTERVAL_S = 5.0  # between lines of progress on standard error
CONTROL_CODE_PATTERN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout; progress goes to stderr")]

Form = TypeVar("Form", bound=BaseModel)

stderr_console = Console(stderr=True, highlight=False, markup=False)  # shown text may have brackets


def show(data: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result, as JSON for a program or as text for a person, without control characters."""
    print(json.dumps(data, ensure_ascii=False, default=str) if as_json else escape_control_codes(text))


def escape_control_codes(text: str) -> str:
    """Escape all control characters but line ends and tabs, so that text from outside cannot control the terminal.

    >>> escape_control_codes("a\\n\\x1b[2J加")
    'a\\n\\\\x1b[2J加'
    """
    return CONTROL_CODE_PATTERN.sub(lambda match: repr(match[0])[1:-1], text)


def show_table(table: Table) -> None:
    """Print a table; a pipe or file has no width, so lines are not wrapped there."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = MAX_LINE_CHARACTERS
    console.print(table)


def fail(message: str, status: int = EXIT_FAILED, *, has_lines: bool = False) -> typer.Exit:
    """Print an error message in one printable line, and return the exception to raise.

    Args:
        has_lines: the message has lines of its own, as the end of a log; each is printed as one.
    """
    lines = message.split("\n") if has_lines else [message]
    print("cotrain: " + "\n".join(make_printable(line, MAX_LINE_CHARACTERS) for line in lines), file=sys.stderr)
    return typer.Exit(status)


def build_form(model: type[Form], fields: dict[str, Any]) -> Form:
    """Build a request body from a command's options; an invalid value gives one line and status 2, by option."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise USAGE_ERROR(describe_errors(error, model, _name_option_of_path)) from None


def parse_json_option(name: str, text: str) -> Any:
    """Parse a JSON option; JSON that is malformed or cannot be sent gives one line and status 2."""
    try:
        return parse_json(text, keep_written=True)
    except BadJson as error:
        raise USAGE_ERROR(f"{' '.join(filter(None, (name, error.place)))}: {error}") from None


def parse_path(text: str) -> Path:
    """Return the path of an option; an empty text, which would be the current folder, gives status 2."""
    if is_blank(text):
        raise typer.BadParameter("must be a path, got an empty text; name a file or folder, or leave the option out")
    return Path(text)


def name_option(field: str) -> str:
    """Return the option of a field or parameter.

    >>> name_option("seq_len")
    '--seq-len'
    """
    return OPTIONS_OF_FIELDS.get(field) or f"--{field.replace('_', '-')}"


def _name_option_of_path(path: str) -> str:
    """Return the option of a dotted path, and the path within its value.

    >>> _name_option_of_path("model_version"), _name_option_of_path("checker.numeric.value"), _name_option_of_path("")
    ('--model-version', '--checker numeric.value', '')
    """
    field, _, rest = path.partition(".")
    return f"{name_option(field)} {rest}".strip() if field else ""


@contextmanager
def name_options() -> Iterator[None]:
    """Report a `FieldError` by the options of its fields: exit status 2. For values that come from options alone."""
    try:
        yield
    except FieldError as error:
        raise typer.BadParameter(error.rule, param_hint=list(map(name_option, error.fields))) from None


def check_text_option(value: str | None) -> str | None:
    """Reject an option or argument that is empty or cannot be sent: exit status 2."""
    if value is not None and (is_blank(value) or find_unstorable(value)):
        raise typer.BadParameter(f"must be text, not {BLANK_TEXT}, without U+0000, got {make_printable(value)!r}")
    return value


def make_option_check(annotation: Any) -> Callable[[str | None], str | None]:
    """Return the callback of an option whose text the portal checks by a type: exit status 2 before it is sent."""
    adapter = TypeAdapter[str](annotation)

    def check(value: str | None) -> str | None:
        if value is None:
            return None
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            raise typer.BadParameter(describe_rule(error.errors(include_url=False)[0])) from None

    return check


@contextmanager
def explain_errors() -> Iterator[None]:
    """Turn an error that the user can fix into one line, and status 2 for wrong arguments, else 1.

    `flows.cli.app` wraps the parsing and the run of every command in it.
    Other errors are faults of the program and keep their traceback.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # the first two are subclasses of RuntimeError
        raise
    except USAGE_ERROR as error:
        if (message := describe_usage_error(error)) is None:
            raise
        raise fail(message, EXIT_USAGE) from None
    except Exception as error:
        if (message := describe_failure(error)) is None:
            raise
        message = ": ".join([*getattr(error, "__notes__", ()), message])
        for row in (error.body.rows or []) if isinstance(error, PortalError) else []:
            print(f"  row {row.row}: {make_printable(row.reason, MAX_LINE_CHARACTERS)}", file=sys.stderr)
        raise fail(message, has_lines=isinstance(error, RuntimeError)) from None


def read_version_option(option: str, text: str) -> int:
    """Return the number of the version that an option names; exit status 2 if it is none."""
    try:
        return parse_version_number(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=[option]) from None


def check_version(text: str) -> str:
    """Reject what is neither a version as 7 or v7 nor may be an alias: exit status 2."""
    try:
        is_version_number(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


@contextmanager
def note_alias(version: str) -> Iterator[None]:
    """Note on an error of connecting to the registry that the version was no number, but may be a misspelled path."""
    try:
        yield
    except Exception as error:
        if not is_version_number(version):
            error.add_note(f"{version!r} is no version as 7 or v7, and cannot be looked up as an alias")
        raise


def write_output_file(option: str, file: Path, text: str) -> None:
    """Write the file that an option names.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        file.write_text(text)
    except OSError as error:
        raise ValueError(f"{option} {file} cannot be written: {error.strerror}; name another file") from None
