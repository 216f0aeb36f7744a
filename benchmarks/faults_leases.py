"""Two hundred random kills of lease holders: `python benchmarks/faults_leases.py [KILLS]`, nine minutes.

Goals: no device leased to two processes at once, none lost at the end, no request left in the queue.

Processes request one to eight of eight devices on two nodes and hold them with a time to live (TTL) of two seconds;
each has a child process on its devices, as training has. At random moments holders, children, or both get SIGKILL, or a
holder gets SIGSTOP; a reaper works as the dispatcher does. Every process on a device locks that device's file, so the
kernel detects a device used by two processes, independent of the records under test.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pairs import make_line, print_lines
from sqlalchemy import func, select

from feedback import leases
from feedback.tables import Base, Lease, PoolDevice
from flows.stack.stack_config import load_or_make_config, write_environment
from flows.stack.stores import make_postgres_service
from flows.supervisor.lease_holder import SessionFactory, hold_lease
from flows.supervisor.reaper import reap_dead_leases
from infra.database import make_session_factory, open_engine
from infra.keeper import STACK_ID_VARIABLE, kill_stack_processes
from infra.launchers.job import make_job_name
from infra.launchers.local import JOB_VARIABLE, LocalLauncher
from infra.postgres import Postgres
from infra.processes import find_pids, kill_processes
from infra.settings import Settings
from yuan.plan.pool import DeviceGroup, Pool

POOL_NAME = "bench"
NUM_DEVICES = 8
NUM_HOLDERS = 6
HEARTBEAT_TIMEOUT_S = 2.0
TURN_VARIABLE = "BENCH_TURN"

# Occupy devices until killed; record a device that another process occupies.
OCCUPY_DEVICES_SCRIPT = """
import fcntl, sys, time
files = []
for device in sys.argv[2:]:
    files.append(open(f"{sys.argv[1]}/{device.replace('/', '-')}", "w"))
    try:
        fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        open(f"{sys.argv[1]}/violations", "a").write(device + chr(10))
time.sleep(3600)
"""


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as name, start_database(Path(name)) as settings:
        figures = run_trial(Path(name), settings, kills)
    ok = True
    for name, figure, goal in (
        ("devices leased to two processes at once", figures["doubled"], 0),
        ("devices lost at the end", NUM_DEVICES - (figures["free"] or 0), 0),
        ("requests left waiting", figures["waiting"], 0),
    ):
        ok &= print_lines(
            {**make_line(name, figure, "of 8 devices"), "goal": f"{goal}", "ok": figure == goal, **figures}
        )
    return 0 if ok else 1


@contextlib.contextmanager
def start_database(home: Path) -> Iterator[Settings]:
    """Start a separate PostgreSQL with our tables."""
    config = load_or_make_config(home)
    write_environment(home, config)
    settings = Settings(_env_file=home / "env", home=home)
    postgres = Postgres(
        home / "pg", port=config.ports["postgres"], password=config.secrets["postgres"], durable=config.durable
    )
    service = make_postgres_service(config, settings, postgres)
    service.before()
    env = {**service.env, STACK_ID_VARIABLE: config.stack_id}
    process = subprocess.Popen(
        service.command(), env=env, cwd=service.cwd, stdout=-3, stderr=-3, start_new_session=True
    )
    try:
        for _ in range(600):
            with contextlib.suppress(Exception):
                service.check()
                break
            time.sleep(0.05)
        service.after()
        yield settings
    finally:
        kill_stack_processes(config.stack_id, spare={os.getpid()})
        process.wait()


def run_trial(folder: Path, settings: Settings, kills: int) -> dict[str, float | None]:
    engine = open_engine(settings)
    sessions = make_session_factory(engine)
    group = DeviceGroup(device_class="g", count=NUM_DEVICES, memory_gib=8, sustained_tflops=1, devices_per_node=4)
    with sessions.begin() as session:
        Base.metadata.create_all(session.connection(), checkfirst=True)
        leases.register_pool(session, Pool(name=POOL_NAME, groups=(group,)))
    rng = random.Random(0)
    holders: list[subprocess.Popen[bytes]] = []
    killed_leases: set[str] = set()
    num_kills, start = 0, time.monotonic()
    while num_kills < kills:
        holders = [holder for holder in holders if holder.poll() is None]
        while len(holders) < NUM_HOLDERS:
            holders.append(start_holder(folder, settings, rng.randint(1, NUM_DEVICES)))
        time.sleep(rng.uniform(0.05, 0.5))
        num_kills += kill_holder(rng, sessions, killed_leases)
        reap_dead_leases(sessions, {POOL_NAME: LocalLauncher()})
    for holder in holders:  # running holders exit on this signal; the reaper ends the stopped ones
        with contextlib.suppress(ProcessLookupError):
            holder.send_signal(signal.SIGUSR1)
    end = time.monotonic() + 60
    while time.monotonic() < end and any(holder.poll() is None for holder in holders):
        reap_dead_leases(sessions, {POOL_NAME: LocalLauncher()})
        time.sleep(0.2)
    seconds = time.monotonic() - start
    time.sleep(HEARTBEAT_TIMEOUT_S)
    reap_dead_leases(sessions, {POOL_NAME: LocalLauncher()})
    with sessions() as session:
        granted = select(func.count()).where(Lease.granted_at.is_not(None))
        figures = {
            "kills": num_kills,
            "doubled": len((folder / "violations").read_text().splitlines()) if (folder / "violations").exists() else 0,
            "free": sum(device.run_id is None for device in leases.list_devices(session, POOL_NAME)),
            "waiting": len(list(session.scalars(leases.select_waiting_leases(POOL_NAME)))),
            "granted": session.scalar(granted),
            "reaped": session.scalar(granted.where(Lease.end_reason == "its holder exited")),
            "device_hours": round(sum(leases.compute_device_hours(session, by="team").values()), 3),
            "devices": session.scalar(select(func.count()).select_from(PoolDevice)),
            "seconds": round(seconds),
        }
    kill_processes(TURN_VARIABLE, str(folder))
    engine.dispose()
    return figures


def kill_holder(rng: random.Random, sessions: SessionFactory, killed_leases: set[str]) -> int:
    """Kill or stop one process that holds devices, optionally its child first; return 0 if there is none, else 1."""
    with sessions() as session:
        held_now = [
            lease for lease in leases.find_open_leases(session) if lease.devices and lease.id not in killed_leases
        ]
    if not held_now:
        return 0
    lease = rng.choice(held_now)
    killed_leases.add(lease.id)
    kind = rng.choice(("kill", "kill", "child first", "stop"))
    with contextlib.suppress(ProcessLookupError):
        for child in list(find_pids(JOB_VARIABLE, make_job_name(lease.id))) if kind == "child first" else ():
            os.kill(child, signal.SIGKILL)
        os.kill(int(lease.holder.split(":")[-2]), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    return 1


def start_holder(folder: Path, settings: Settings, count: int) -> subprocess.Popen[bytes]:
    env = {**os.environ, "COTRAIN_HOME": str(settings.home), TURN_VARIABLE: str(folder)}
    command = [sys.executable, __file__, "hold", str(folder), str(count)]
    with (folder / "holders.log").open("ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def hold(folder: Path, count: int) -> None:
    """Lease devices repeatedly, each time with a child process that locks their files while it uses them."""
    settings = Settings(_env_file=Path(os.environ["COTRAIN_HOME"]) / "env")
    sessions = make_session_factory(open_engine(settings))
    stopping: list[int] = []
    signal.signal(signal.SIGUSR1, lambda *_: stopping.append(1))
    rng = random.Random(os.getpid())
    while not stopping:
        with hold_lease(
            sessions, POOL_NAME, {"g": count}, run_id=str(os.getpid()), team="bench", ttl_s=HEARTBEAT_TIMEOUT_S
        ) as lease:
            command = [sys.executable, "-I", "-S", "-c", OCCUPY_DEVICES_SCRIPT, str(folder), *lease.devices]
            child = subprocess.Popen(command, env={**os.environ, JOB_VARIABLE: make_job_name(lease.id)})
            end = time.monotonic() + rng.uniform(0.3, 2.0)
            while time.monotonic() < end and not lease.lost.is_set() and child.poll() is None:
                time.sleep(0.02)
            child.kill()
            child.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["hold"]:
        hold(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())
