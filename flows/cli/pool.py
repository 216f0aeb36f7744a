"""`cotrain pool show | lose | return`: the devices that runs are scheduled on, their leases and the queue."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from feedback import leases
from feedback.tables import Lease
from flows.cli.output import JsonOption, show
from flows.stack.pool_records import open_pool_records

pool = typer.Typer(no_args_is_help=True, help="Show and change the devices that runs are scheduled on.")

PoolNameOption = Annotated[str, typer.Option("--pool", help="name of the pool; default: the pool of this installation")]


@pool.command(name="show")
def show_(name: PoolNameOption = "", as_json: JsonOption = False) -> None:
    """Show devices, leases, the queue in order, and device-hours by run and team."""
    records = open_pool_records(name)
    with records.sessions() as session:
        waiting_leases = session.scalars(leases.select_waiting_leases(records.pool)).all()
        contents: dict[str, Any] = {
            "pool": records.pool,
            "devices": [asdict(device) for device in leases.list_devices(session, records.pool)],
            "waiting": [_build_lease_row(lease) for lease in waiting_leases],
            "hours": {by: leases.compute_device_hours(session, by) for by in ("run_id", "team")},
        }
    lines = [f"pool {records.pool}"]
    for device in contents["devices"]:
        host = f" on {device['lost_host']}" if device["lost_host"] else ""
        unused = "reserved for serving" if device["is_reserved"] else "free"
        state = f"lost{host}: {device['lost_reason']}" if device["lost_reason"] else device["run_id"] or unused
        lines.append(f"  {device['id']:24} {device['node']:24} {state}")
    for row in contents["waiting"]:
        devices = ", ".join(f"{count} {device_class}" for device_class, count in row["wanted"].items())
        lines.append(f"  waiting: {row['run_id']} for {devices}, priority {row['priority']}")
    lines += [f"  {team}: {hours:.2f} device-hours" for team, hours in contents["hours"]["team"].items()]
    show(contents, "\n".join(lines), as_json)


@pool.command()
def lose(
    device: Annotated[str, typer.Argument(help="as `cotrain pool show` names it")],
    reason: Annotated[str, typer.Option(help="reason, shown to everybody who looks for the device")],
    host: Annotated[
        str,
        typer.Option(help="its host name in the batch system: the whole node is lost, and jobs avoid that host"),
    ] = "",
    name: PoolNameOption = "",
    as_json: JsonOption = False,
) -> None:
    """Take a device out of use; a run that uses it is re-planned on the remaining devices."""
    _change_device(device, lost_reason=reason, host=host, name=name, as_json=as_json)


@pool.command(name="return")
def return_(
    device: Annotated[str, typer.Argument(help="as `cotrain pool show` names it")],
    name: PoolNameOption = "",
    as_json: JsonOption = False,
) -> None:
    """Return a repaired device to use; later runs are planned with it."""
    _change_device(device, lost_reason=None, host="", name=name, as_json=as_json)


def _change_device(device: str, *, lost_reason: str | None, host: str, name: str, as_json: bool) -> None:
    records = open_pool_records(name)
    with records.sessions.begin() as session:
        changed = leases.set_device_lost(session, records.pool, device, lost_reason, host or None)
    state = f"out of use: {lost_reason}" if lost_reason else "in use again"
    change = {"pool": records.pool, "device": device, "devices": changed, "lost_reason": lost_reason}
    text = "\n".join(f"{records.pool}/{changed_device} is {state}" for changed_device in changed)
    show(change, text or f"{host} is known to be lost; see cotrain pool show", as_json)


def _build_lease_row(lease: Lease) -> dict[str, Any]:
    return {
        "run_id": lease.run_id,
        "wanted": lease.device_counts,
        "priority": lease.priority,
        "asked_at": lease.requested_at.isoformat(),
    }
