"""The embedded stack: its services, and the keeper's entry."""

import json
import logging
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from flows.home import StackConfig, load_config, write_environment, write_private
from flows.stores import forget_weed_sockets, postgres_service, weed_service
from infra.logs import configure_logging
from infra.postgres import Postgres, wrapped
from infra.services import Keeper, Service
from infra.settings import HOME_VARIABLE, NO_TELEMETRY, Settings, home_folder, load_settings

log = logging.getLogger(__name__)

DISPATCHER_SILENT_S = 30.0


def services(home: Path, config: StackConfig, settings: Settings) -> list[Service]:
    """The embedded stack in starting order."""
    postgres = Postgres(home / "pg", config.ports["postgres"], config.secrets["postgres"], config.durable)
    return [
        postgres_service(config, settings, postgres),
        weed_service(home, config, settings),
        _mlflow(home, config, settings, postgres),
        _prefect(home, config, settings, postgres),
        _portal(home, settings),
        _model_server(home, settings),
        _dispatcher(home, settings),
        _worker(home, settings),
    ]


def _mlflow(home: Path, config: StackConfig, settings: Settings, postgres: Postgres) -> Service:
    work = home / "mlflow"
    password = config.secrets["mlflow"]

    def database(name: str) -> str:
        return postgres.url(name, name, config.secrets[f"{name}_database"]).replace(
            "postgresql:", "postgresql+psycopg:"
        )

    def before() -> None:
        for name in ("mlflow", "mlflow_auth"):
            postgres.ensure_database(name, config.secrets[f"{name}_database"])
        work.mkdir(exist_ok=True, mode=0o700)
        lines = [
            "[mlflow]",
            "default_permission = NO_PERMISSIONS",
            f"database_uri = {database('mlflow_auth')}",
            f"admin_username = {settings.mlflow_username}",
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
            "grant_default_workspace_access = false",
            "auth_cache_ttl_seconds = 60",
        ]
        write_private(work / "auth.ini", "\n".join(lines) + "\n")

    def check() -> None:
        for path in (f"users/get?username={settings.mlflow_username}", "experiments/get?experiment_id=0"):
            url = f"{settings.mlflow_url}/api/2.0/mlflow/{path}"
            httpx.get(url, auth=(settings.mlflow_username, password), timeout=3).raise_for_status()

    def after() -> None:
        from infra.tracker import Tracker

        Tracker(settings).set_up()

    command = ["mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(config.ports["mlflow"]), "--artifacts-destination", "s3://mlflow", "--serve-artifacts"]
    return Service(
        name="mlflow",
        command=lambda: [*wrapped("SIGTERM", "same", 0, sys.executable), "-m", *command],
        env=_mlflow_environment(work, settings, config, database("mlflow")),
        cwd=work,
        before=before,
        check=check,
        after=after,
        needs=("postgres", "s3"),
    )


def _mlflow_environment(work: Path, settings: Settings, config: StackConfig, database_url: str) -> dict[str, str]:
    """Only what the server needs; passwords travel here, since a command line is public."""
    return {
        "PATH": f"{sysconfig.get_path('scripts')}:/usr/bin:/bin",
        "HOME": str(work),
        "TMPDIR": str(work),
        "LC_ALL": "C.UTF-8",
        "MLFLOW_AUTH_CONFIG_PATH": str(work / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": settings.mlflow_username,
        "MLFLOW_AUTH_ADMIN_PASSWORD": config.secrets["mlflow"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": config.secrets["mlflow_session"],
        "MLFLOW_BACKEND_STORE_URI": database_url,
        "MLFLOW_S3_ENDPOINT_URL": settings.s3_endpoint,
        "AWS_ACCESS_KEY_ID": settings.s3_access_key,
        "AWS_SECRET_ACCESS_KEY": settings.s3_secret_key.get_secret_value(),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        **NO_TELEMETRY,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Without workspaces every account may make experiments and models of its own.
        "MLFLOW_ENABLE_WORKSPACES": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }


def prefect_environment(home: Path, settings: Settings) -> dict[str, str]:
    """What every process that talks to Prefect needs."""
    return {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": settings.prefect_api_url,
        "PREFECT_API_AUTH_STRING": settings.prefect_auth.get_secret_value(),
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
        "PREFECT_CLIENT_MAX_RETRIES": "10",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,feedback,yuan,infra",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # the dispatcher uses the same code outside of runs
    }


def own_environment(home: Path, settings: Settings) -> dict[str, str]:
    """The environment of our own services."""
    (home / "tmp").mkdir(exist_ok=True, mode=0o700)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "HOME") if name in os.environ}
    return {
        **kept,
        **prefect_environment(home, settings),
        HOME_VARIABLE: str(home),
        "TMPDIR": str(home / "tmp"),
        "PYTHONUNBUFFERED": "1",
        **NO_TELEMETRY,
    }


def _prefect(home: Path, config: StackConfig, settings: Settings, postgres: Postgres) -> Service:
    url = postgres.url("prefect", "prefect", config.secrets["prefect_database"])
    env = own_environment(home, settings)
    env.pop("PREFECT_API_URL")
    env |= {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": url.replace("postgresql:", "postgresql+asyncpg:"),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(config.ports["prefect"]),
        "PREFECT_SERVER_API_AUTH_STRING": settings.prefect_auth.get_secret_value(),
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "prefect" / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    return Service(
        name="prefect",
        command=lambda: [*wrapped("SIGTERM", "same", 0, sys.executable), "-m", "prefect", "server", "start"],
        env=env,
        cwd=home,
        before=lambda: postgres.ensure_database("prefect", config.secrets["prefect_database"]),
        check=lambda: _ok(f"{settings.prefect_api_url}/ready"),
        needs=("postgres",),
    )


def _ok(url: str, token: str | None = None) -> None:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    httpx.get(url, headers=headers, timeout=3).raise_for_status()


def _own(
    home: Path,
    settings: Settings,
    name: str,
    module: str,
    check: Callable[[], None],
    needs: tuple[str, ...],
    **more: Any,
) -> Service:
    return Service(
        name=name,
        command=lambda: [*wrapped("SIGTERM", "same", 0, sys.executable), "-m", module],
        env=own_environment(home, settings),
        cwd=home,
        check=check,
        needs=needs,
        **more,
    )


def _portal(home: Path, settings: Settings) -> Service:
    return _own(
        home, settings, "portal", "feedback.run", lambda: _ok(f"{settings.portal_url}/health"), ("postgres", "s3")
    )


def _model_server(home: Path, settings: Settings) -> Service:
    def check() -> None:
        _ok(f"{settings.model_server_url}/v1/models", settings.model_server_token.get_secret_value())

    return _own(home, settings, "model-server", "yuan.serve.run", check, ("mlflow",))


def _dispatcher(home: Path, settings: Settings) -> Service:
    sign = home / "dispatcher.json"

    def check() -> None:
        age = time.time() - float(json.loads(sign.read_text())["time"])
        if age > DISPATCHER_SILENT_S:
            raise TimeoutError(f"no sign of life for {age:.0f} s")

    def before() -> None:
        sign.unlink(missing_ok=True)

    return _own(home, settings, "dispatcher", "flows.dispatch", check, ("prefect", "mlflow"), before=before)


def _worker(home: Path, settings: Settings) -> Service:
    def check() -> None:
        user, _, password = settings.prefect_auth.get_secret_value().partition(":")
        url = f"{settings.prefect_api_url}/work_pools/cotrain/workers/filter"
        answer = httpx.post(url, json={}, auth=(user, password), timeout=3).raise_for_status()
        if not any(worker["status"] == "ONLINE" for worker in answer.json()):
            raise ConnectionError("no worker is online")

    command = ["prefect", "worker", "start", "--pool", "cotrain", "--type", "process", "--name", "embedded"]
    return Service(
        name="worker",
        command=lambda: [*wrapped("SIGTERM", "same", 0, sys.executable), "-m", *command, "--install-policy", "never"],
        env={**own_environment(home, settings), "PREFECT_WORKER_QUERY_SECONDS": "0.5"},
        cwd=home,
        check=check,
        needs=("prefect",),
    )


def main() -> None:
    """Entry of the keeper: `python -m flows.stack`, on `$COTRAIN_HOME`."""
    configure_logging()
    home = home_folder()
    config = load_config(home)
    (home / "logs").mkdir(exist_ok=True, mode=0o700)
    write_environment(home, config)
    settings = load_settings()
    try:
        Keeper(services(home, config, settings), home, config.stack_id).run()
    finally:
        forget_weed_sockets(config)


if __name__ == "__main__":
    main()
