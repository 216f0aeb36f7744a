"""Read the state of the embedded stack: its services, its URLs and its faults."""

from dataclasses import dataclass
from pathlib import Path

from flows.registration_record import RegistrationProgress, read_registration_progress
from flows.stack.doctor import (
    find_cleanup_faults,
    find_config_faults,
    find_disk_faults,
    find_keeper_faults,
    find_machine_faults,
    find_recipe_faults,
    find_retention_faults,
    find_setting_faults,
    find_stack_faults,
)
from flows.stack.findings import Finding
from flows.stack.stack_config import load_config
from flows.stack.stack_control import ServiceStates
from infra.keeper_lock import is_keeper_running
from infra.keeper_state import read_service_states
from infra.settings import Settings


@dataclass(frozen=True, kw_only=True)
class StackStatus:
    """Hold the state of a stack.

    Attributes:
        is_up: true if a keeper runs.
        services: states of the services by name; empty if the stack is not up.
        urls: URLs of the web interfaces by service; empty if the stack is not up or its config cannot be read.
        faults: the findings with a fault.
        registration: the registration of weights that runs or was killed.
    """

    is_up: bool
    services: ServiceStates
    urls: dict[str, str]
    faults: list[Finding]
    registration: RegistrationProgress | None


def read_stack_status(home: Path) -> StackStatus:
    """Read the states of the services, and check what is quick to check."""
    is_up = is_keeper_running(home)
    config_faults = find_config_faults(home)
    setting_faults = find_setting_faults(home) or find_recipe_faults(home)  # settings name the default recipe
    setting_faults += find_retention_faults(home) or find_cleanup_faults(home)
    faults = [*find_disk_faults(home), *setting_faults, *find_keeper_faults(home), *config_faults]
    return StackStatus(
        is_up=is_up,
        services=read_service_states(home) if is_up else {},
        urls=get_public_urls(home) if is_up and not config_faults else {},
        faults=faults + [finding for finding in examine_running_stack(home) if finding.fault],
        registration=read_registration_progress(home),
    )


def diagnose(home: Path) -> list[Finding]:
    """Check settings, machine and stack, and run every probe of a running stack."""
    setting_faults = find_setting_faults(home) or find_recipe_faults(home)  # settings name the default recipe
    setting_faults += find_retention_faults(home) or find_cleanup_faults(home)
    faults = setting_faults + find_machine_faults(home) + find_stack_faults(home)
    return faults + examine_running_stack(home)


def examine_running_stack(home: Path) -> list[Finding]:
    """Return the probes' findings about a running stack; none if no stack runs or its settings cannot be read."""
    if not is_keeper_running(home) or find_config_faults(home) or find_setting_faults(home):
        return []
    # Imported here, since both import MLflow, which takes a second: `up`, and `status` of a stopped stack, do without.
    from flows.context import open_context
    from flows.stack.probes import examine_stack

    return examine_stack(open_context(Settings))


def get_public_urls(home: Path) -> dict[str, str]:
    """Return the URLs of the web interfaces by service."""
    ports = load_config(home).ports
    return {name: f"http://127.0.0.1:{ports[name]}" for name in ("portal", "prefect", "mlflow")}
