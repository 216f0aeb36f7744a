"""`cotrain pool show | lose | return`: the devices that runs are scheduled on, who has them, and who waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from flows.cli.output import JsonOption, explain_errors, show

pool = typer.Typer(no_args_is_help=True, help="Devices that runs are scheduled on.")

PoolNameOption = Annotated[str, typer.Option("--pool", help="the pool's name; default: the installation's")]


@pool.command(name="show")
def show_(name: PoolNameOption = "", as_json: JsonOption = False) -> None:
    """Show devices, leases, the queue in its order, and device-hours by run and team."""
    from feedback import leases

    with explain_errors(), _explain_pool_errors():
        context, name = _open_pool(name)
        with context.sessions() as session:
            found: dict[str, Any] = {
                "pool": name,
                "devices": leases.list_devices(session, name),
                "waiting": [_build_lease_row(lease) for lease in session.scalars(leases.select_waiting_leases(name))],
                "hours": {by: leases.compute_device_hours(session, by) for by in ("run_id", "team")},
            }
    lines = [f"pool {name}"]
    for device in found["devices"]:
        where = f" on {device['lost_host']}" if device["lost_host"] else ""
        state = f"lost{where}: {device['lost_reason']}" if device["lost_reason"] else device["run_id"] or "free"
        lines.append(f"  {device['id']:24} {device['node']:24} {state}")
    lines += [f"  waiting: {w['run_id']} for {w['wanted']}, priority {w['priority']}" for w in found["waiting"]]
    lines += [f"  {team}: {hours:.2f} device-hours" for team, hours in found["hours"]["team"].items()]
    show(found, "\n".join(lines), as_json)


@pool.command()
def lose(
    device: Annotated[str, typer.Argument(help="as `cotrain pool show` names it")],
    reason: Annotated[str, typer.Option(help="for those who find it gone")],
    host: Annotated[
        str, typer.Option(help="its machine, by the batch system's name: a whole node goes, and jobs avoid the machine")
    ] = "",
    name: PoolNameOption = "",
    as_json: JsonOption = False,
) -> None:
    """Take a device out of use; a run that has it is planned anew on what is left."""
    _change_device(device, reason, host, name, as_json)


@pool.command(name="return")
def return_(
    device: Annotated[str, typer.Argument(help="as `cotrain pool show` names it")],
    name: PoolNameOption = "",
    as_json: JsonOption = False,
) -> None:
    """Put a mended device back into use; later runs are planned with it."""
    _change_device(device, None, "", name, as_json)


def _change_device(device: str, lost_reason: str | None, host: str, name: str, as_json: bool) -> None:
    from feedback import leases

    with explain_errors(), _explain_pool_errors():
        context, name = _open_pool(name)
        with context.sessions.begin() as session:
            changed = leases.set_device_lost(session, name, device, lost_reason, host or None)
    state = f"out of use: {lost_reason}" if lost_reason else "in use again"
    found = {"pool": name, "device": device, "devices": changed, "lost_reason": lost_reason}
    said = "\n".join(f"{name}/{one} is {state}" for one in changed)
    show(found, said or f"{host} is known to be lost; see cotrain pool show", as_json)


@contextmanager
def _explain_pool_errors() -> Iterator[None]:
    """A pool or a device that there is not, or a database that is down, is the caller's to mend."""
    from sqlalchemy.exc import OperationalError

    from feedback.accounts import NotFound

    try:
        yield
    except NotFound as error:
        raise ValueError(f"{error}; see `cotrain pool show`") from None
    except OperationalError:
        raise ValueError("PostgreSQL does not answer; is the stack up? see `cotrain status`") from None


def _open_pool(name: str) -> tuple[Any, str]:
    """The installation and the pool asked for, its devices as the pool's file has them now."""
    from feedback import leases
    from flows.context import open_context
    from flows.supervisor.pool_launcher import load_configured_pool
    from infra.settings import Settings

    context = open_context(Settings)
    own = load_configured_pool(context.settings)
    if name in ("", own.name):
        with context.sessions.begin() as session:
            leases.register_pool(session, own)
    return context, name or own.name


def _build_lease_row(lease: Any) -> dict[str, Any]:
    asked = lease.asked_at.isoformat()
    return {"run_id": lease.run_id, "wanted": lease.wanted, "priority": lease.priority, "asked_at": asked}


def add_commands(app: typer.Typer) -> None:
    app.add_typer(pool, name="pool")
