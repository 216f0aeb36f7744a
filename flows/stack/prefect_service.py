"""The embedded stack's Prefect server, and the environment of its clients."""

import sys
from pathlib import Path

from flows.stack.platform_service import check_url, make_private_folders
from flows.stack.stack_config import StackConfig
from infra.confinement import Confinement, build_confined_environment
from infra.health import LivenessPolicy, check_answer
from infra.keeper import ManagedService
from infra.postgres import Postgres
from infra.settings import PrefectAccess, Settings
from infra.telemetry import NO_TELEMETRY_VARIABLES


def make_prefect_service(home: Path, config: StackConfig, settings: Settings, postgres: Postgres) -> ManagedService:
    """Describe the Prefect server behind its gate, with its own database."""
    # asyncpg has no require_auth option; infra/scram_only.py replaces it.
    url = postgres.url("prefect", "prefect", config.secrets["prefect_database"]).partition("?")[0]
    work, port = home / "prefect", config.ports["prefect"]
    env = build_confined_environment(work, **NO_TELEMETRY_VARIABLES) | {
        "PREFECT_HOME": str(work),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": url.replace("postgresql:", "postgresql+asyncpg:"),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_API_AUTH_STRING": settings.prefect_auth.get_secret_value(),
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_API_URL": "/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(work / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "COTRAIN_PORTAL_URL": settings.portal_url,
    }

    def before() -> None:
        make_private_folders(work)
        postgres.ensure_database("prefect", config.secrets["prefect_database"])

    confinement = Confinement(write=(work,), connect=(port, config.ports["postgres"]), is_server=True)
    return ManagedService(
        name="prefect",
        command=lambda: confinement.command(sys.executable, "-m", "flows.prefect_gate"),
        env=env,
        cwd=work,
        before=before,
        check=lambda: check_url(f"{settings.prefect_api_url}/ready"),
        liveness=LivenessPolicy(lambda: check_answer(f"{settings.prefect_api_url}/health")),
        listen=settings.prefect_api_url,
        needs=("postgres",),
    )


def build_prefect_environment(folder: Path, settings: PrefectAccess) -> dict[str, str]:
    """Build the environment of a process that uses Prefect's client, which keeps its files in the given folder."""
    return {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": settings.prefect_api_url,
        "PREFECT_API_AUTH_STRING": settings.prefect_auth.get_secret_value(),
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
        "PREFECT_CLIENT_MAX_RETRIES": "10",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,feedback,yuan,infra",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # the dispatcher uses the same code outside of runs
    }
