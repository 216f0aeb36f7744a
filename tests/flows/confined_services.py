"""Run a probe in place of each service, under its confinement and with its environment."""

import json
import subprocess
import sys

from flows.stack.services import make_services
from flows.stack.stack_config import load_config
from infra.keeper import find_stack_pids
from infra.keeper_state import read_keeper_state
from infra.settings import Settings

PROBE = """
import ctypes, json, os, resource, socket, sys
home, own, pids = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
reached = []
def attempt(path, do):
    try:
        do(path)
    except OSError:
        return
    reached.append(path)
def is_own(path):
    return any(path == folder or path.startswith(folder + "/") for folder in own)
for path in json.loads(sys.argv[4]):
    if not is_own(path):
        attempt(path, os.listdir if path.endswith("/") else lambda p: open(p, "rb").read(1))
for pid in pids:
    for name in ("environ", "mem", "fd/0"):
        attempt(f"/proc/{pid}/{name}", lambda p: open(p, "rb").read(1))
attempt("/etc/shadow", lambda p: open(p).read())
libc = ctypes.CDLL(None, use_errno=True)
def set_up_ring(_):
    if libc.syscall(425, 1, ctypes.create_string_buffer(120)) < 0:
        raise OSError(ctypes.get_errno(), "refused")
for pid in pids:
    attempt(f"limit of {pid}", lambda _: resource.prlimit(pid, resource.RLIMIT_CORE))
    attempt(f"priority of {pid}", lambda _: os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid)))
attempt("multipath TCP", lambda _: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close())
attempt("fast open", lambda _: socket.socket().sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", int(sys.argv[5]))))
attempt("io_uring", set_up_ring)
opened = [path for path in own if os.access(path, os.W_OK)]
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
caps = sum(int(status[name], 16) for name in ("CapEff", "CapPrm", "CapAmb"))
found = {"reached": reached, "own": opened, "capabilities": caps, "no_new_privs": status["NoNewPrivs"].strip()}
print(json.dumps(found))
"""


def probe_services(home):
    """Run the probe instead of each service of a running stack; return what each one reached, by the service's name."""
    config = load_config(home)
    settings = Settings(_env_file=(home / "env", home / "env.local"), home=home)
    paths = [f"{path}/" if path.is_dir() else str(path) for path in (home, *home.iterdir(), *home.glob("*/*"))]
    pids = [*find_stack_pids(config.stack_id), read_keeper_state(home).pid]
    port = str(config.ports["portal"])  # only the worker may connect to it
    reports = {}
    for service in make_services(home, config, settings):
        command = service.command()[:4]
        specification = json.loads(command[3])
        own_folders = [
            path.rstrip("/") for path in (*specification["write"], *specification["read"]) if path.startswith(str(home))
        ]
        probe = [sys.executable, "-c", PROBE, str(home), *map(json.dumps, (own_folders, pids, paths)), port]
        result = subprocess.run(
            [*command, *probe], env=dict(service.env), cwd=service.cwd, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        reports[service.name] = json.loads(result.stdout)
    return reports
