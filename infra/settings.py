"""Where things are: addresses, secrets and limits, read from the environment.

The embedded stack writes the same variables to `$COTRAIN_HOME/env`; an operator's own values
in `$COTRAIN_HOME/env.local` win over those, and real environment variables over both.
`.env.example` describes each.
"""

import os
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

HOME_VARIABLE = "COTRAIN_HOME"
# MLflow would also write into the user's home folder, at its import.
NO_TELEMETRY = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}


def home_folder() -> Path:
    """The folder that holds everything the embedded stack writes."""
    return Path(os.environ.get(HOME_VARIABLE, ".cotrain")).resolve()


class Settings(BaseSettings):
    """Addresses, secrets and limits of one installation. Create it in process entries only, with `load_settings`."""

    model_config = SettingsConfigDict(env_prefix="COTRAIN_", extra="ignore")

    home: Path = Field(default_factory=home_folder)
    stack_id: str = ""
    database_url: SecretStr
    s3_endpoint: str
    s3_bucket: str = "cotrain"
    s3_access_key: str
    s3_secret_key: SecretStr
    mlflow_url: str
    mlflow_username: str = "cotrain-admin"
    mlflow_password: SecretStr
    mlflow_consumer_password: SecretStr
    prefect_api_url: str
    prefect_auth: SecretStr
    portal_url: str
    model_server_url: str
    model_server_token: SecretStr
    operator_token: SecretStr
    split_salt: SecretStr
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    max_report_bytes: int = Field(default=64 * 1024, ge=1024)
    max_upload_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    calendar: str = "0 9 6 * *"
    time_zone: str = "Asia/Shanghai"
    round_after_reports: int = Field(default=200, ge=0)
    pool: str = ""
    team: str = "programme"


def load_settings() -> Settings:
    """Read the settings of `$COTRAIN_HOME` and the environment.

    Raises:
        ValueError: naming the variables that are missing, and how to get them.
    """
    home = home_folder()
    try:
        return Settings(_env_file=(home / "env", home / "env.local"))
    except ValidationError as error:
        wrong = ", ".join(f"COTRAIN_{str(e['loc'][0]).upper()}" for e in error.errors())
        raise ValueError(
            f"no usable settings in {home}: {wrong}; run `cotrain up` or set them as in .env.example"
        ) from None


def child_environment(settings: Settings) -> dict[str, str]:
    """What a child process of ours needs: this environment and the home folder, with stray thread counts fixed."""
    return {**os.environ, HOME_VARIABLE: str(settings.home), "COTRAIN_STACK_ID": settings.stack_id}
