"""The embedded stack's MLflow server."""

import sys
from pathlib import Path

import httpx

from flows.stack.stack_config import StackConfig
from infra.confinement import Confinement, build_confined_environment, parse_port
from infra.files import write_private
from infra.health import LivenessPolicy, check_answer
from infra.http_server import format_uvicorn_options
from infra.keeper import ManagedService
from infra.mlflow_gate import DIGESTS_VARIABLE
from infra.mlflow_rules import CONSUMER_ACCOUNT, READER_ACCOUNT
from infra.postgres import Postgres
from infra.settings import Settings
from infra.telemetry import NO_TELEMETRY_VARIABLES
from infra.throttle import compute_credential_digest

# The names of the secrets of MLflow's read-only accounts.
READ_ONLY_ACCOUNT_SECRETS = {CONSUMER_ACCOUNT: "mlflow_consumer", READER_ACCOUNT: "mlflow_reader"}


def make_mlflow_service(home: Path, config: StackConfig, settings: Settings, postgres: Postgres) -> ManagedService:
    """Describe the MLflow server behind its gate, with its own databases and bucket."""
    work, configuration = home / "mlflow", home / "settings" / "mlflow.ini"
    password = config.secrets["mlflow"]

    def database(name: str) -> str:
        return postgres.url(name, name, config.secrets[f"{name}_database"]).replace(
            "postgresql:", "postgresql+psycopg:"
        )

    def before() -> None:
        for name in ("mlflow", "mlflow_auth"):
            postgres.ensure_database(name, config.secrets[f"{name}_database"])
        for folder in (work, configuration.parent):
            folder.mkdir(exist_ok=True, mode=0o700)
        lines = [
            "[mlflow]",
            "default_permission = NO_PERMISSIONS",
            f"database_uri = {database('mlflow_auth')}",
            f"admin_username = {settings.mlflow_username}",
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
            "grant_default_workspace_access = false",
            "auth_cache_ttl_seconds = 60",
        ]
        write_private(configuration, "\n".join(lines) + "\n")

    def check() -> None:
        for path in (f"users/get?username={settings.mlflow_username}", "experiments/get?experiment_id=0"):
            url = f"{settings.mlflow_url}/api/2.0/mlflow/{path}"
            response = httpx.get(url, auth=(settings.mlflow_username, password), timeout=3)
            if response.status_code == 401:
                change_admin_password(settings, config.retired.get("mlflow", []), password)
            response.raise_for_status()

    def after() -> None:
        # Imported here, since MLflow takes a second to import, and `cotrain up` waits for the keeper's first service.
        from infra.tracker import Tracker

        Tracker(settings).set_up({name: config.secrets[secret] for name, secret in READ_ONLY_ACCOUNT_SECRETS.items()})

    command = ["mlflow", "server", "--app-name", "cotrain", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(config.ports["mlflow"]), "--artifacts-destination", "s3://mlflow", "--serve-artifacts"]
    command += ["--uvicorn-opts", format_uvicorn_options()]
    ports = (config.ports["postgres"], parse_port(settings.s3_endpoint))
    confinement = Confinement(read=(configuration,), write=(work,), connect=ports, is_server=True)
    return ManagedService(
        name="mlflow",
        command=lambda: confinement.command(sys.executable, "-m", *command),
        env=_build_mlflow_environment(
            work=work, configuration=configuration, settings=settings, config=config, database_url=database("mlflow")
        ),
        cwd=work,
        before=before,
        check=check,
        after=after,
        liveness=LivenessPolicy(lambda: check_answer(f"{settings.mlflow_url}/health")),
        listen=settings.mlflow_url,
        needs=("postgres", "s3"),
    )


def _build_mlflow_environment(
    *, work: Path, configuration: Path, settings: Settings, config: StackConfig, database_url: str
) -> dict[str, str]:
    """Build the server's environment; passwords are passed here, since command lines are visible to other users."""
    return {
        **build_confined_environment(work, LC_ALL="C.UTF-8"),
        "MLFLOW_AUTH_CONFIG_PATH": str(configuration),
        "MLFLOW_AUTH_ADMIN_USERNAME": settings.mlflow_username,
        "MLFLOW_AUTH_ADMIN_PASSWORD": config.secrets["mlflow"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": config.secrets["mlflow_session"],
        "MLFLOW_BACKEND_STORE_URI": database_url,
        "MLFLOW_S3_ENDPOINT_URL": settings.s3_endpoint,
        "AWS_ACCESS_KEY_ID": config.secrets["mlflow_s3_access_key"],
        "AWS_SECRET_ACCESS_KEY": config.secrets["mlflow_s3_secret_key"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        **NO_TELEMETRY_VARIABLES,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ENABLE_AI_GATEWAY": "false",
        "FORWARDED_ALLOW_IPS": "",  # uvicorn would believe X-Forwarded-For from loopback
        DIGESTS_VARIABLE: " ".join(
            compute_credential_digest(name, config.secrets[secret])
            for name, secret in {settings.mlflow_username: "mlflow", **READ_ONLY_ACCOUNT_SECRETS}.items()
        ),
        # Without workspaces every account may create experiments and models.
        "MLFLOW_ENABLE_WORKSPACES": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }


def change_admin_password(settings: Settings, retired_passwords: list[str], new_password: str) -> None:
    """Set the password of MLflow's administrator to the rotated one, if a retired one is still valid."""
    url = f"{settings.mlflow_url}/api/2.0/mlflow/users/update-password"
    for old_password in retired_passwords:
        body = {
            "username": settings.mlflow_username,
            "password": new_password,
            "current_password": old_password,
        }
        httpx.patch(url, json=body, auth=(settings.mlflow_username, old_password), timeout=10)
