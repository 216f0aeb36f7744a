"""The services of the embedded stack, and the keeper's entry point."""

import contextlib
from pathlib import Path

from flows.stack.dispatcher_service import make_dispatcher_service
from flows.stack.mlflow_service import make_mlflow_service
from flows.stack.model_server_service import make_model_server_service
from flows.stack.portal_service import make_portal_service
from flows.stack.prefect_service import make_prefect_service
from flows.stack.stack_config import StackConfig, load_config, replace_blocked_ports, write_environment
from flows.stack.stores import make_postgres_service, make_weed_service, remove_weed_sockets
from flows.stack.worker_service import make_worker_service
from infra.keeper import Keeper, ManagedService
from infra.logs import configure_logging
from infra.postgres import Postgres
from infra.settings import Settings, get_home_folder, load_settings


def make_services(home: Path, config: StackConfig, settings: Settings) -> list[ManagedService]:
    """Describe the services of the embedded stack, in start order."""
    postgres = Postgres(
        home / "pg",
        port=config.ports["postgres"],
        password=config.secrets["postgres"],
        durable=config.durable,
        retired=tuple(config.retired.get("postgres", ())),
    )
    return [
        make_postgres_service(config, settings, postgres),
        make_weed_service(home, config, settings),
        make_mlflow_service(home, config, settings, postgres),
        make_prefect_service(home, config, settings, postgres),
        make_portal_service(home, settings),
        make_model_server_service(home, settings),
        make_dispatcher_service(home, settings),
        make_worker_service(home, settings),
    ]


def main() -> None:
    """Run the keeper on `$COTRAIN_HOME`: `python -m flows.stack`."""
    configure_logging()
    home = get_home_folder()
    config = replace_blocked_ports(home, load_config(home))
    (home / "logs").mkdir(exist_ok=True, mode=0o700)
    write_environment(home, config)
    settings = load_settings(Settings)
    try:
        Keeper(make_services(home, config, settings), home, config.stack_id).run()
    finally:
        with contextlib.suppress(PermissionError):
            remove_weed_sockets(config)
