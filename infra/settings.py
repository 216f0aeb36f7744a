"""Where things are: addresses, secrets and limits, one class per process with the fields that process uses.

The embedded stack writes a file for each class, `$COTRAIN_HOME/settings/NAME.env`, which only that process can read.
The operator's own commands read all of it, `$COTRAIN_HOME/env`, with the operator's values in `env.local` over it.
Without these files, the variables of the environment count, as in `.env.example`; they win over files everywhere.
"""

import os
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.mlflow_rules import READER

HOME_VARIABLE = "COTRAIN_HOME"
PREFIX = "COTRAIN_"
# MLflow would also write into the user's home folder, at its import.
NO_TELEMETRY = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}


def home_folder() -> Path:
    """Return the folder that holds everything the embedded stack writes."""
    return Path(os.environ.get(HOME_VARIABLE, ".cotrain")).resolve()


class ProcessSettings(BaseSettings):
    """What every process knows. Create settings in process entries only, with `load_settings`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore")
    files: ClassVar[tuple[str, ...]] = ()

    home: Path = Field(default_factory=home_folder)


class DatabaseAccess(ProcessSettings):
    """The platform's own database."""

    database_url: SecretStr


class StoreAccess(ProcessSettings):
    """The object store."""

    s3_endpoint: str
    s3_bucket: str = "cotrain"
    s3_access_key: str
    s3_secret_key: SecretStr


class TrackerAccess(ProcessSettings):
    """The tracking server, and the account to use there."""

    mlflow_url: str
    mlflow_username: str = "cotrain-admin"
    mlflow_password: SecretStr


class PrefectAccess(ProcessSettings):
    """The Prefect server and its one account, `NAME:PASSWORD`."""

    prefect_api_url: str
    prefect_auth: SecretStr


class ModelServerAccess(ProcessSettings):
    """The internal model server."""

    model_server_url: str
    model_server_token: SecretStr


class PoolChoice(ProcessSettings):
    """The pool that runs are planned for, and whose device-hours they are."""

    pool: str = ""
    team: str = "programme"


class RecordsAccess(DatabaseAccess, TrackerAccess, PoolChoice):
    """What rounds are recorded in, and the devices they are planned for."""


class PortalSettings(DatabaseAccess, StoreAccess, ModelServerAccess):
    """The portal."""

    files: ClassVar[tuple[str, ...]] = ("settings/portal.env",)

    portal_url: str
    max_report_bytes: int = Field(default=64 * 1024, ge=1024)
    max_upload_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    max_account_bytes: int = Field(default=20 * 1024**3, ge=1024)


class ModelServerSettings(TrackerAccess, ModelServerAccess):
    """The model server; its account at MLflow only reads."""

    files: ClassVar[tuple[str, ...]] = ("settings/model-server.env",)


class DispatcherSettings(RecordsAccess, PrefectAccess):
    """The dispatcher."""

    files: ClassVar[tuple[str, ...]] = ("settings/dispatcher.env",)

    calendar: str = "0 9 6 * *"
    time_zone: str = "Asia/Shanghai"
    round_after_reports: int = Field(default=200, ge=0)


class WorkerSettings(PrefectAccess):
    """Prefect's worker."""

    files: ClassVar[tuple[str, ...]] = ("settings/worker.env",)


class FlowSettings(RecordsAccess, StoreAccess, PrefectAccess, ModelServerAccess):
    """A flow run: what a round and reproduction work with."""

    files: ClassVar[tuple[str, ...]] = ("settings/flow.env",)

    stack_id: str = ""
    portal_url: str
    split_salt: SecretStr
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    mlflow_reader_password: SecretStr


class Settings(PortalSettings, DispatcherSettings, FlowSettings):
    """Everything: for the operator's commands and the keeper, never for a process that speaks to callers."""

    files: ClassVar[tuple[str, ...]] = ("env", "env.local")

    operator_token: SecretStr
    mlflow_consumer_password: SecretStr


Chosen = TypeVar("Chosen", bound=ProcessSettings)


def load_settings(kind: type[Chosen]) -> Chosen:
    """Read the settings of a process from its files in `$COTRAIN_HOME` and from the environment.

    Raises:
        ValueError: naming the variables that are missing, and how to get them.
    """
    home = home_folder()
    try:
        return kind(_env_file=tuple(home / name for name in kind.files))
    except ValidationError as error:
        wrong = ", ".join(f"{PREFIX}{str(e['loc'][0]).upper()}" for e in error.errors())
        raise ValueError(
            f"no usable settings in {home}: {wrong}; run `cotrain up` or set them as in .env.example"
        ) from None


def process_files(settings: Settings) -> dict[str, str]:
    """Return the settings file of each process, by its path in the home folder; a process gets the fields it uses."""
    reader = settings.model_copy(update={"mlflow_username": READER, "mlflow_password": settings.mlflow_reader_password})
    return {
        PortalSettings.files[0]: _as_file(PortalSettings, settings),
        ModelServerSettings.files[0]: _as_file(ModelServerSettings, reader),
        DispatcherSettings.files[0]: _as_file(DispatcherSettings, settings),
        WorkerSettings.files[0]: _as_file(WorkerSettings, settings),
        FlowSettings.files[0]: _as_file(FlowSettings, settings),
    }


def _as_file(kind: type[ProcessSettings], settings: Settings) -> str:
    lines = []
    for name in kind.model_fields:
        value = getattr(settings, name)
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        if name != "home":
            quoted = text.replace("\\", "\\\\").replace("'", "\\'")
            lines.append(f"{PREFIX}{name.upper()}='{quoted}'\n")
    return "".join(lines)
