"""Describe an error that the user of a command can fix in one line with the way out; all commands use this table."""

import os

import httpx
import typer
from pydantic import ValidationError

from feedback.portal_responses import UNUSABLE_RESPONSE, PortalError
from infra.files import DISK_FULL_ERRNOS
from yuan.data.rule_text import describe_errors, describe_rule
from yuan.data.text import make_printable

# Errors of servers and records, compared by the names of their classes, since importing their modules takes seconds.
DATABASE_ERROR_NAMES = {"sqlalchemy.exc.SQLAlchemyError", "psycopg.Error"}
STORE_ERROR_NAMES = {
    "botocore.exceptions.BotoCoreError",
    "botocore.exceptions.ClientError",
    "boto3.exceptions.Boto3Error",
}
MLFLOW_ERROR_NAMES = {"mlflow.exceptions.MlflowException"}
RECORD_ERROR_NAMES = {"feedback.accounts.NotFound", "feedback.leases.NoCapacity"}
# Parts of OpenSSL's messages about a server whose first bytes are not TLS.
TLS_FAULTS = (
    "WRONG_VERSION_NUMBER",
    "WRONG VERSION NUMBER",
    "RECORD LAYER FAILURE",
    "RECORD_LAYER_FAILURE",
    "HTTP_REQUEST",
)
# The class of all errors of the parser, which Typer exports by some of its subclasses only.
USAGE_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")
MAX_USAGE_CHARACTERS = 400
OWN_PACKAGES = ("flows", "feedback", "yuan", "infra")
# Packages of the smaller extras, by the names of their modules; any other that is missing is of [platform].
EXTRA_BY_PACKAGE = {
    **dict.fromkeys(("deepspeed", "numpy", "safetensors", "scipy", "sentencepiece", "torch", "zstandard"), "train"),
    "kubernetes": "kubernetes",
}


def describe_failure(error: Exception) -> str | None:
    """Return the line, with further lines where the error's own message has them; None for a fault of the program."""
    if isinstance(error, PortalError):
        if error.body.type == UNUSABLE_RESPONSE:
            return error.body.message
        field = f" ({error.body.param})" if error.body.param else ""
        fix = "; check --token, COTRAIN_TOKEN or the operator's COTRAIN_OPERATOR_TOKEN" if error.status == 401 else ""
        return f"refused with {error.status}: {error.body.message}{field}{fix}"
    if isinstance(error, httpx.LocalProtocolError):
        return f"the request cannot be sent ({error}); check --token, --idempotency-key and --url"
    if isinstance(error, httpx.TransportError):
        return _describe_transport_error(error)
    if isinstance(error, ValidationError):
        return describe_errors(error)
    if isinstance(error, ModuleNotFoundError):
        return _describe_missing_package(error)

    names = {f"{ancestor.__module__}.{ancestor.__qualname__}" for ancestor in type(error).__mro__}
    if names & DATABASE_ERROR_NAMES:
        cause = getattr(error, "orig", None) or error  # the driver's, without SQLAlchemy's statement and link
        return f"PostgreSQL cannot be used ({_get_first_line(cause)}); see `cotrain status` and COTRAIN_DATABASE_URL"
    if names & STORE_ERROR_NAMES:
        return f"the object store cannot be used ({_get_first_line(error)}); see `cotrain status`"
    if names & MLFLOW_ERROR_NAMES:
        return f"MLflow refused the request: {_get_first_line(error)}; see `cotrain doctor`"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return _describe_system_error(error, os.fsdecode(error.filename))
    if names & RECORD_ERROR_NAMES or isinstance(error, ValueError | OSError | RuntimeError):
        return str(error).strip() or type(error).__name__
    return None


def describe_usage_error(error: Exception) -> str | None:
    """Return the line for arguments that the parser refuses; None if the error only shows the help of a group."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return None
    message: str = error.format_message()  # type: ignore[attr-defined]
    cause = error.__context__
    if isinstance(cause, ValidationError):  # of the value of an option or argument
        entry = cause.errors(include_url=False)[0]
        message = message.replace(entry["msg"], describe_rule(entry))
    message = message.replace(". Did you mean", "; did you mean")
    context = error.ctx  # type: ignore[attr-defined]
    help_text = f"see `{context.command_path} --help`" if context is not None else "see `cotrain --help`"
    shown = make_printable(message.strip().rstrip("."), MAX_USAGE_CHARACTERS)
    return f"{shown[:1].lower()}{shown[1:]}; {help_text}"


def _describe_system_error(error: OSError, path: str) -> str:
    """Return what is wrong with a path; of a full disk, also the bytes if the error has them."""
    if error.errno not in DISK_FULL_ERRNOS:
        return f"{path} cannot be used: {error.strerror}; check the path and its permissions"
    is_plain = error.strerror == os.strerror(error.errno)  # else it says what to do
    return f"{path} cannot be written: {error.strerror}{'; make room there' if is_plain else ''}"


def _describe_missing_package(error: ModuleNotFoundError) -> str | None:
    """Return how to install a package of an extra; None for a module of the platform itself."""
    package = (error.name or "").partition(".")[0]
    if not package or package in OWN_PACKAGES:
        return None
    extra = EXTRA_BY_PACKAGE.get(package, "platform")
    return f"this command needs {package}, which the base package lacks; run `pip install 'cotrain[{extra}]'`"


def _describe_transport_error(error: httpx.TransportError) -> str:
    """Return which server does not answer, and the other protocol if that is the reason."""
    server, reason = _name_server(error), _get_first_line(error)
    if any(fault in reason.upper() for fault in TLS_FAULTS):
        return f"{server} speaks no HTTPS ({reason}); write the address with http://, or check its port"
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) and server.startswith("the server at http:"):
        return f"{server} closes the connection without a response ({reason}); if it speaks HTTPS, write https://"
    return f"{server} does not answer ({reason}); check --url, and `cotrain status` on the machine of the portal"


def _name_server(error: httpx.TransportError) -> str:
    """Return the server of a failed request; the portal if no request was made."""
    try:
        url = error.request.url
    except RuntimeError:
        return "the portal"
    return f"the server at {url.scheme}://{url.netloc.decode()}"


def _get_first_line(error: BaseException) -> str:
    """Return the first line of an error's message, of which some drivers write many; its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
