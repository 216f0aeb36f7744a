"""Load addresses, secrets and limits: one settings class per process, with only the fields that the process uses.

The embedded stack writes a file for each class, `$COTRAIN_HOME/settings/NAME.env`, which only that process can read.
The operator's commands read all settings, `$COTRAIN_HOME/env`, overridden by the operator's values in `env.local`.
Environment variables override all files; without files they are the only source, as in `.env.example`.
"""

import os
import zoneinfo
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from dotenv.parser import Binding, parse_stream
from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.mlflow_rules import READER_ACCOUNT

HOME_VARIABLE = "COTRAIN_HOME"
SETTINGS_VARIABLE_PREFIX = "COTRAIN_"
MAX_SHOWN_VALUE_CHARACTERS = 60  # of a wrong value in an error message


def get_home_folder() -> Path:
    """Return the folder that holds everything the embedded stack writes."""
    return Path(os.environ.get(HOME_VARIABLE, ".cotrain")).resolve()


class ProcessSettings(BaseSettings):
    """Hold the settings of every process. Create settings in process entries only, with `load_settings`."""

    model_config = SettingsConfigDict(env_prefix=SETTINGS_VARIABLE_PREFIX, extra="ignore")
    files: ClassVar[tuple[str, ...]] = ()

    home: Path = Field(default_factory=get_home_folder)


class DatabaseAccess(ProcessSettings):
    """Give access to the platform's database."""

    database_url: SecretStr


class StoreAccess(ProcessSettings):
    """Give access to the object store."""

    s3_endpoint: str
    s3_bucket: str = "cotrain"
    s3_access_key: str
    s3_secret_key: SecretStr


class TrackerAccess(ProcessSettings):
    """Give access to the tracking server: address and account."""

    mlflow_url: str
    mlflow_username: str = "cotrain-admin"
    mlflow_password: SecretStr
    registry_transfer: Literal["direct", "streamed"] = "direct"
    max_cache_bytes: int = Field(default=64 * 1024**3, ge=0)


class PrefectAccess(ProcessSettings):
    """Give access to the Prefect server: address and its only account, `NAME:PASSWORD`."""

    prefect_api_url: str
    prefect_auth: SecretStr


class ModelServerAccess(ProcessSettings):
    """Give access to the internal model server."""

    model_server_url: str
    model_server_token: SecretStr


class PoolSettings(ProcessSettings):
    """Name the pool that runs are planned for, the team charged with their device-hours, and the rounds' recipe.

    Alone they are read by the operator's commands, with no stack up.
    """

    files: ClassVar[tuple[str, ...]] = ("env", "env.local")

    pool: str = ""
    recipe: str = "demo"
    team: str = "programme"


class RecordsAccess(DatabaseAccess, TrackerAccess, PoolSettings):
    """Give access to the database and tracker that record rounds, and name the device pool."""


def _check_endpoint(address: str) -> str:
    parts = urlsplit(address)
    if address and (parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query):
        raise ValueError("must be an address such as https://HOST:PORT without a path, or empty")
    return address


class PortalSettings(DatabaseAccess, StoreAccess, ModelServerAccess):
    """Configure the portal."""

    files: ClassVar[tuple[str, ...]] = ("settings/portal.env",)

    portal_url: str
    s3_public_endpoint: Annotated[str, AfterValidator(_check_endpoint)] = ""
    max_report_bytes: int = Field(default=64 * 1024, ge=1024)
    max_upload_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    max_account_bytes: int = Field(default=20 * 1024**3, ge=1024)
    max_daily_reports: int = Field(default=5000, ge=1)
    max_daily_datasets: int = Field(default=1000, ge=1)


class ModelServerSettings(TrackerAccess, ModelServerAccess):
    """Configure the model server; its MLflow account is read-only."""

    files: ClassVar[tuple[str, ...]] = ("settings/model-server.env",)

    serving_cache_gib: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    serving_devices: Literal["host", "leased"] = "host"


def _check_calendar(cron: str) -> str:
    if len(cron.split()) != 5:
        raise ValueError("must be a cron of five fields, such as 0 9 6 * *")
    return cron


# Files of the time zone database that Python opens but on which Prefect's server fails.
UNUSABLE_TIME_ZONES = frozenset({"Factory", "localtime", "posixrules"})


def _check_time_zone(name: str) -> str:
    try:
        zoneinfo.ZoneInfo(name)
        if name in UNUSABLE_TIME_ZONES:
            raise ValueError(name)
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        raise ValueError("must be a time zone's name, such as Asia/Shanghai") from None
    return name


class DispatcherSettings(RecordsAccess, StoreAccess, PrefectAccess, ModelServerAccess):
    """Configure the dispatcher."""

    files: ClassVar[tuple[str, ...]] = ("settings/dispatcher.env",)

    calendar: Annotated[str, AfterValidator(_check_calendar)] = "0 9 6 * *"
    time_zone: Annotated[str, AfterValidator(_check_time_zone)] = "Asia/Shanghai"
    round_after_reports: int = Field(default=200, ge=0)


class WorkerSettings(PrefectAccess):
    """Configure Prefect's worker."""

    files: ClassVar[tuple[str, ...]] = ("settings/worker.env",)


class FlowSettings(RecordsAccess, StoreAccess, PrefectAccess, ModelServerAccess):
    """Configure a flow run: a round or a reproduction."""

    files: ClassVar[tuple[str, ...]] = ("settings/flow.env",)

    stack_id: str = ""
    portal_url: str
    split_salt: SecretStr
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    max_account_cases: int = Field(default=5000, ge=0)
    max_token_cache_bytes: int = Field(default=50 * 2**30, ge=0)
    token_workers: int = Field(default=0, ge=0, le=1024)


class Settings(PortalSettings, ModelServerSettings, DispatcherSettings, FlowSettings):
    """Hold all settings, for the operator's commands and the keeper; never for a process that serves clients."""

    files: ClassVar[tuple[str, ...]] = ("env", "env.local")

    operator_token: SecretStr
    mlflow_consumer_password: SecretStr
    mlflow_reader_password: SecretStr


SettingsT = TypeVar("SettingsT", bound=ProcessSettings)


def load_settings(kind: type[SettingsT]) -> SettingsT:
    """Read the settings of a process from its files in `$COTRAIN_HOME` and from the environment.

    Raises:
        ValueError: as `read_settings`.
    """
    return read_settings(kind, get_home_folder())


def read_settings(kind: type[SettingsT], home: Path) -> SettingsT:
    """Read the settings of a process from its files in a home folder and from the environment.

    Raises:
        ValueError: if variables are missing or values break their rules; the message names them and the fix.
    """
    files = [home / name for name in kind.files]
    try:
        return kind(_env_file=files, home=home)
    except ValidationError as error:
        if descriptions := _describe_wrong_values(error, files):
            raise ValueError(f"{'; '.join(descriptions)}; correct the value there") from None
        missing = ", ".join(get_variable_name(str(detail["loc"][0])) for detail in error.errors())
        raise ValueError(
            f"no usable settings in {home}: {missing}; run `cotrain up` or set them as in .env.example"
        ) from None


def find_wrong_values(file: Path) -> list[str]:
    """Describe the values of a file, and of the environment, that break a setting's rule: variable, rule and place."""
    try:
        Settings(_env_file=file)
    except ValidationError as error:
        return _describe_wrong_values(error, [file])
    return []


def _describe_wrong_values(error: ValidationError, files: Sequence[Path]) -> list[str]:
    descriptions = []
    for detail in error.errors(include_url=False):
        if detail["type"] != "missing":
            name = get_variable_name(str(detail["loc"][0]))
            rule = detail["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
            value = str(detail["input"])[:MAX_SHOWN_VALUE_CHARACTERS]
            descriptions.append(f"{name} {rule}, got {value!r} ({_find_setting_place(name, files)})")
    return descriptions


def _find_setting_place(name: str, files: Sequence[Path]) -> str:
    if name in map(str.upper, os.environ):
        return "a variable of the environment"
    places = [
        describe_variable_place(binding, file)
        for file in files
        for binding in parse_variable_file(file)
        if (binding.key or "").upper() == name
    ]
    return places[-1]  # a later file overrides an earlier one


def describe_variable_place(binding: Binding, file: Path) -> str:
    """Return the file and line where a variable is set; a parsed binding begins with the empty lines before it."""
    text = binding.original.string
    empty = text[: len(text) - len(text.lstrip())].count("\n")
    return f"{file}, line {binding.original.line + empty}"


def parse_variable_file(file: Path) -> list[Binding]:
    """Parse a file of variables in the same way as the settings; empty if the file does not exist.

    Raises:
        OSError: if it cannot be read.
        UnicodeDecodeError: if it is not UTF-8.
    """
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as stream:
        return list(parse_stream(stream))


def get_variable_name(field: str) -> str:
    """Return the name of a field's environment variable."""
    return f"{SETTINGS_VARIABLE_PREFIX}{field.upper()}"


def render_process_files(settings: Settings) -> dict[str, str]:
    """Render the settings file of each process, keyed by its path in the home folder, with the fields it uses."""
    reader = settings.model_copy(
        update={"mlflow_username": READER_ACCOUNT, "mlflow_password": settings.mlflow_reader_password}
    )
    return {
        PortalSettings.files[0]: _render_settings_file(PortalSettings, settings),
        ModelServerSettings.files[0]: _render_settings_file(ModelServerSettings, reader),
        DispatcherSettings.files[0]: _render_settings_file(DispatcherSettings, settings),
        WorkerSettings.files[0]: _render_settings_file(WorkerSettings, settings),
        FlowSettings.files[0]: _render_settings_file(FlowSettings, settings),
    }


def _render_settings_file(kind: type[ProcessSettings], settings: Settings) -> str:
    lines = []
    for name in kind.model_fields:
        value = getattr(settings, name)
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        if name != "home":
            quoted = text.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"{get_variable_name(name)}='{quoted}'\n")
    return "".join(lines)
