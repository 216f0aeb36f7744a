"""Run a real one-node Slurm cluster in a folder, from Debian's packages, for the tests that need one."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.waiting import wait_until

MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
needs_slurm = pytest.mark.skipif(
    bool(MISSING), reason=f"needs Slurm, missing: {', '.join(MISSING)} of Debian's slurm-wlm, munge"
)

# EnableIPv6: with IPv4 alone Slurm finds no address, not even 127.0.0.1, where only loopback is up, as in a network
# namespace of its own, since it sets AI_ADDRCONFIG.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=10
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny,EnableIPv6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=5
SlurmdTimeout=10
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
"""


def find_free_ports(count):
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@contextlib.contextmanager
def start_slurm_cluster(timeout_s=90.0):
    """Start the cluster; Slurm's commands find it through SLURM_CONF. All its processes end with the block."""
    # munge requires that every user can enter the folders above its socket
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, pytest.MonkeyPatch.context() as environment:
        folder = Path(name)
        host = write_config(folder)
        environment.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        with contextlib.ExitStack() as processes:
            files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "seed-file": "seed"}
            munge = [f"--{name}={folder / 'munge' / file}" for name, file in files.items()]
            processes.enter_context(run_daemon("munged", "--foreground", *munge))
            wait_until(lambda: (folder / "munge" / "sock").exists(), timeout_s)
            processes.enter_context(run_daemon("slurmctld", "-D", "-i"))
            processes.enter_context(run_daemon("slurmd", "-D", "-N", host))
            wait_until(lambda: "idle" in run_command("sinfo", "--noheader", "--format=%T"), timeout_s)
            yield folder
            run_command("scancel", "--me")
            wait_until(lambda: not run_command("squeue", "--noheader"))


def write_config(folder):
    """Write the cluster's files; return the name of its node."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    folder.chmod(0o755)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    (folder / "plugstack.conf").touch()
    host, user = socket.gethostname().split(".")[0], os.environ.get("USER") or "root"
    values = {"folder": folder, "host": host, "user": user, "ports": find_free_ports(2)}
    (folder / "slurm.conf").write_text(CONFIG.format(**values))
    return host


@contextlib.contextmanager
def run_daemon(*command):
    """Run a process until the block ends, also by an error."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_command(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
