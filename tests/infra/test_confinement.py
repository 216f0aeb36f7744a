"""Test what a confined process can access, as root and as an ordinary user."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infra import confined_child, confinement
from infra.confined_child import ConfinementSpec
from infra.confinement import CHILD_PROGRAM, Confinement, build_confined_environment, is_landlock_enforced
from infra.launchers.job import Job
from infra.launchers.local import LocalLauncher

SYSTEM_PYTHON = "/usr/bin/python3"  # an ordinary user may not enter the folder of the running Python
ORDINARY = 61_777
PROBE = """
import ctypes, json, os, resource, socket, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, do):
    try:
        do()
    except OSError as error:
        found[name] = type(error).__name__
    else:
        found[name] = "allowed"
own, other, victim, port = sys.argv[1:]
found = {}
attempt("read own", lambda: open(f"{own}/file").read())
attempt("write own", lambda: open(f"{own}/new", "w").write("x"))
attempt("rename own", lambda: os.rename(f"{own}/new", f"{own}/sub/new"))
attempt("read other", lambda: open(f"{other}/file").read())
attempt("list other", lambda: os.listdir(other))
attempt("write other", lambda: open(f"{other}/new", "w").write("x"))
attempt("link other", lambda: os.link(f"{other}/file", f"{own}/link"))
attempt("read shadow", lambda: open("/etc/shadow").read())
attempt("environment", lambda: open(f"/proc/{victim}/environ").read())
attempt("memory", lambda: open(f"/proc/{victim}/mem", "rb").read(1))
attempt("root link", lambda: os.listdir(f"/proc/{victim}/root"))
attempt("signal", lambda: os.kill(int(victim), 0))
attempt("connect", lambda: socket.create_connection(("127.0.0.1", int(port)), timeout=2).close())
attempt("listen", lambda: socket.create_server(("127.0.0.1", 0)).close())
def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def open_fast(send):
    with socket.socket() as client:
        send(client)
address, cores = ("127.0.0.1", int(port)), os.sched_getaffinity(0)
attempt("limit other", lambda: resource.prlimit(int(victim), resource.RLIMIT_CPU))
attempt("limit own", lambda: resource.prlimit(0, resource.RLIMIT_CPU))
attempt("priority of other", lambda: os.setpriority(os.PRIO_PROCESS, int(victim), 19))
attempt("priority of user", lambda: os.setpriority(os.PRIO_USER, 0, 19))
attempt("priority of own", lambda: os.setpriority(os.PRIO_PROCESS, 0, 1))
attempt("scheduler of other", lambda: os.sched_setscheduler(int(victim), os.SCHED_IDLE, os.sched_param(0)))
attempt("affinity of own", lambda: os.sched_setaffinity(0, cores))
attempt("affinity of other", lambda: os.sched_setaffinity(int(victim), {min(cores)}))
found["affinity of other changed"] = os.sched_getaffinity(int(victim)) == {min(cores)} != cores
attempt("multipath TCP", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).close())
attempt("SCTP", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132).close())
attempt("SMC", lambda: socket.socket(43, socket.SOCK_STREAM, 0).close())
attempt("connect by sendto", lambda: open_fast(lambda client: client.sendto(b"x", socket.MSG_FASTOPEN, address)))
attempt("connect by sendmsg", lambda: open_fast(lambda c: c.sendmsg([b"x"], [], socket.MSG_FASTOPEN, address)))
attempt("io_uring", lambda: call(425, 1, ctypes.create_string_buffer(120)))
if os.uname().machine == "x86_64":
    attempt("keys", lambda: call(250, 0, -3, 0))
    attempt("x32", lambda: call(0x40000000 + 39))
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close())
attempt("unix", lambda: [end.close() for end in socket.socketpair()])
attempt("unix datagrams", lambda: [end.close() for end in socket.socketpair(type=socket.SOCK_DGRAM)])
attempt("unix to others", lambda: socket.socket(socket.AF_UNIX).close())
def leave(call):
    child = os.fork()
    if child == 0:
        try:
            call()
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise PermissionError("in the child")
attempt("system v", lambda: call({"x86_64": 29, "aarch64": 194}[os.uname().machine], 0x636f7472, 4096, 0o1600))
attempt("session", lambda: leave(os.setsid))
attempt("group", lambda: leave(lambda: os.setpgid(0, 0)))
attempt("execute own", lambda: subprocess.run([f"{own}/program"], check=True))
lines = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
found["capabilities"] = int(lines["CapEff"], 16) | int(lines["CapPrm"], 16)
found["no new privileges"] = int(lines["NoNewPrivs"])
print(json.dumps(found))
"""
OWN_FILES = {"read own", "write own", "rename own"}
OWN_CALLS = {"affinity of other", "limit own", "priority of own", "affinity of own", "udp", "unix"}
NOT_A_SERVERS = {"unix datagrams", "unix to others", "session", "group"}
needs_seccomp = pytest.mark.skipif(
    not confined_child.has_seccomp(), reason="this kernel or architecture has no filter of calls"
)
needs_landlock = pytest.mark.skipif(not is_landlock_enforced(), reason="this kernel has no Landlock")


@pytest.fixture(params=["this user", "an ordinary user"])
def probe(request, tmp_path_factory):
    """Return a function that runs the probe under a confinement and returns the result of each attempt."""
    is_ordinary = request.param == "an ordinary user"
    if is_ordinary and (os.geteuid() != 0 or not Path(SYSTEM_PYTHON).exists()):
        pytest.skip("only root can become another user, and that one needs the system's Python")
    python = SYSTEM_PYTHON if is_ordinary else sys.executable
    folder = Path(tmp_path_factory.mktemp("probe"))
    shared = folder
    if is_ordinary:  # below /tmp, where its parents can be entered
        shared = Path("/tmp") / f"cotrain-probe-{os.getpid()}"
    own_folder, other = shared / "own", shared / "other"
    (own_folder / "sub").mkdir(parents=True)
    other.mkdir()
    for place in (own_folder, other):
        (place / "file").write_text("secret")
    shutil.copy("/bin/true", own_folder / "program")
    (shared / "probe.py").write_text(PROBE)
    (shared / "confined_child.py").write_text(CHILD_PROGRAM.read_text())
    identity = {"user": ORDINARY, "group": ORDINARY, "extra_groups": []} if is_ordinary else {}
    if is_ordinary:
        for path in (shared, *shared.rglob("*")):
            os.chown(path, ORDINARY, ORDINARY)
    victim = subprocess.Popen(["/bin/sleep", "60"], env={"SECRET": "s"}, **identity)
    listener = socket.create_server(("127.0.0.1", 0))

    def run(confinement):
        command = confinement.command(python, str(shared / "probe.py"), *map(str, (own_folder, other, victim.pid)),
                                      str(listener.getsockname()[1]))  # fmt: skip
        command[0], command[2] = python, str(shared / "confined_child.py")
        specification = json.loads(command[3])
        specification["read"].append(str(shared / "probe.py"))
        command[3] = json.dumps(specification)
        result = subprocess.run(
            command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, cwd="/", **identity
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    yield run, own_folder, listener.getsockname()[1]
    victim.kill()
    victim.wait()
    listener.close()
    shutil.rmtree(shared)


@needs_landlock
@needs_seccomp
def test_a_confined_process_reaches_its_own_folder_and_nothing_else(probe):
    run, own_folder, _ = probe
    report = run(Confinement(write=(own_folder,), connect=()))
    allowed = {name for name, result in report.items() if result == "allowed"}
    assert allowed - OWN_CALLS - NOT_A_SERVERS <= OWN_FILES, report
    assert allowed >= OWN_FILES, report
    assert report["capabilities"] == 0
    assert report["no new privileges"] == 1


@needs_seccomp
def test_confined_server_cannot_pass_its_socket_or_change_its_process_group(probe):
    run, own_folder, _ = probe
    report = run(Confinement(write=(own_folder,), connect=(), is_server=True))
    assert {report[name] for name in NOT_A_SERVERS} == {"PermissionError"}, report
    assert {report[name] for name in OWN_CALLS} == {"allowed"}, report


@needs_seccomp
def test_confined_process_cannot_change_others_or_bypass_tcp_checks(probe):
    run, own_folder, _ = probe
    report = run(Confinement(write=(own_folder,), connect=None, scope_signals=False))
    refused = {"limit other", "priority of other", "priority of user", "scheduler of other", "multipath TCP", "SCTP"}
    refused |= {"system v", "SMC", "connect by sendto", "connect by sendmsg", "keys", "x32"} & report.keys()
    assert {report[name] for name in refused} == {"PermissionError"}, report
    assert report["io_uring"] == "OSError"
    assert report["affinity of other changed"] is False
    assert {report[name] for name in OWN_CALLS | NOT_A_SERVERS} == {"allowed"}, report


@needs_seccomp
def test_threads_that_are_bound_to_cores_start(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "2"}
    code = "import torch; torch.set_num_threads(2); print((torch.ones(600, 600) @ torch.ones(600, 600)).exp().shape)"
    command = Confinement(write=(tmp_path,)).command(sys.executable, "-c", code)
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert result.returncode == 0, result.stderr


@needs_landlock
@pytest.mark.skipif(confined_child.get_landlock_version() < 6, reason="this kernel confines no ports or signals")
def test_ports_and_signals_are_open_where_they_are_granted(probe):
    run, own_folder, port = probe
    report = run(Confinement(write=(own_folder,), connect=(port,), bind=(0,), scope_signals=False))
    assert {report["connect"], report["signal"], report["listen"]} == {"allowed"}
    assert report["environment"] == "PermissionError"


def test_confined_environment_contains_no_secret_of_its_parent(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "cotrain:secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    built = build_confined_environment(tmp_path, COTRAIN_HOME="x")
    assert "secret" not in " ".join(built.values())
    assert built["TORCH_COMPILE_DISABLE"] == "1"
    assert (built["NCCL_SOCKET_IFNAME"], built["HOME"], built["COTRAIN_HOME"]) == ("eth0", str(tmp_path), "x")


@needs_landlock
def test_confined_process_finds_the_accelerators_it_grants():
    code = "from infra import confinement as c; c.ACCELERATOR_FILE_PATTERNS = ('null',); "
    code += "print(*c.find_accelerator_files())"
    result = subprocess.run(Confinement().command(sys.executable, "-c", code), capture_output=True, text=True, cwd="/")
    assert result.stdout.strip() == "/dev/null", result.stderr


WRITE_PROBE = """
import json, os, subprocess, sys, threading
def can_write(path):
    try:
        open(path, "r+").close()
    except OSError:
        return False
    return True
def can_name(process, thread):
    try:
        with open(f"/proc/{process}/task/{thread}/comm", "r+") as file:
            file.write("probe")
    except OSError:
        return False
    return True
def can_name_threads():
    answers = []
    thread = threading.Thread(target=lambda: answers.append(can_name("self", threading.get_native_id())))
    thread.start()
    thread.join()
    return answers[0] and can_name("self", os.getpid())
if len(sys.argv) > 1:
    print(int(can_name_threads()))
    sys.exit()
victim = os.getppid()
settings = ("sys/kernel/core_pattern", "sys/vm/overcommit_memory", "sysrq-trigger", "irq/default_smp_affinity")
found = {
    "own threads": can_name_threads(),
    "threads of a descendant": subprocess.check_output([sys.executable, "-c", CODE, "x"]) == b"1\\n",
    "settings of the kernel": any(can_write(f"/proc/{name}") for name in settings),
    "memory of another": can_write(f"/proc/{victim}/mem"),
    "threads of another": can_name(victim, victim),
    "is read": bool(open("/proc/sys/kernel/core_pattern").read()),
}
print(json.dumps(found))
"""


@needs_landlock
@pytest.mark.parametrize("thread_names", ["none", "own", "descendants"])
def test_cuda_can_write_only_thread_names_in_proc(thread_names, tmp_path):
    code = f"CODE = {WRITE_PROBE!r}\n" + WRITE_PROBE
    command = Confinement(write=(tmp_path,), scope_signals=False).command(sys.executable, "-c", code)
    specification = json.loads(command[3])
    command[3] = json.dumps({**specification, "thread_names": thread_names})
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert json.loads(result.stdout) == {
        "own threads": thread_names != "none",
        "threads of a descendant": thread_names == "descendants",
        "settings of the kernel": False,
        "memory of another": False,
        "threads of another": False,
        "is read": True,
    }, result.stderr


@needs_landlock
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may write the kernel's settings")
def test_root_without_cap_sys_admin_cannot_write_proc():
    """The alternative, all of /proc, would include the kernel's settings."""
    code = f"CODE = {WRITE_PROBE!r}\n" + WRITE_PROBE
    inner = Confinement().command(sys.executable, "-c", code)
    inner[3] = json.dumps({**json.loads(inner[3]), "thread_names": "descendants"})
    outer = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(CHILD_PROGRAM.parent)!r}); import confined_child, os; ",
    ]
    outer[2] += f"confined_child.drop_capabilities(); os.execv({inner[0]!r}, {inner!r})"
    result = subprocess.run(outer, capture_output=True, text=True, cwd="/")
    probed = json.loads(result.stdout)
    assert not probed["own threads"] and not probed["settings of the kernel"]
    assert "fail with error 304" in result.stderr and "CAP_SYS_ADMIN" in result.stderr


OPEN_PROBE = """
import os, sys
def can_open(path, folder=None):
    try:
        os.close(os.open(path, os.O_WRONLY, dir_fd=folder))
    except OSError:
        return False
    return True
setting = "sys/kernel/core_pattern"
print(can_open(f"/proc/{setting}"), can_open(f"{sys.argv[1]}/{setting}"), can_open(f"proc/{setting}", 9), end=" ")
print(os.listdir("/proc/fs") == [], can_open(f"/proc/self/task/{os.getpid()}/comm"))
"""


@needs_landlock
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may write the kernel's settings")
def test_kernel_settings_cannot_be_written_by_way_of_another_mount_or_descriptor(tmp_path):
    """The machine has /proc at a second place too, an inherited descriptor leads to it, and /proc/fs is masked."""
    second = tmp_path / "proc"
    second.mkdir()
    command = Confinement().command(sys.executable, "-c", OPEN_PROBE, str(second))
    command[3] = json.dumps({**json.loads(command[3]), "thread_names": "descendants"})
    setup = f"mount --bind /proc {second} && mount -t tmpfs none /proc/fs && exec 9</ && exec "
    script = setup + " ".join(map(shlex.quote, command))
    result = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, cwd="/")
    assert result.stdout.split() == ["False", "False", "False", "True", "True"], result.stderr


SOCKET_PROBE = """
import os, socket, sys, time
own, other = (f"\\0{sys.argv[1]}-{rank}" for rank in (os.environ["RANK"], 1 - int(os.environ["RANK"])))
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind(own)
deadline = time.monotonic() + 60
while True:
    try:
        receiver.sendto(b"handle", other)
        break
    except ConnectionRefusedError:
        assert time.monotonic() < deadline
        time.sleep(0.05)
receiver.settimeout(60)
with open(f"{sys.argv[1]}.{os.environ['RANK']}", "wb") as file:
    file.write(receiver.recv(100))
"""


@needs_landlock
def test_ranks_of_a_confined_job_exchange_messages_over_abstract_sockets(tmp_path):
    """NCCL passes memory handles between GPUs in this way; every rank is confined by itself."""
    program = tmp_path / "probe.py"
    program.write_text(SOCKET_PROBE)
    job = Job(
        name="probe",
        module="probe",
        folder=tmp_path,
        num_processes=2,
        processes_per_node=2,
        environment={},
        log_name="log",
    )
    command = LocalLauncher(confined=True).build_command(job)
    place = command.index("-m", command.index("--no-python"))
    command[place:] = [str(program), str(tmp_path / "message")]
    environment = build_confined_environment(tmp_path)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"message.{rank}").read_bytes() for rank in range(2)] == [b"handle"] * 2
    torchrun, rank = (json.loads(part) for part in command if part.startswith('{"read"'))
    assert torchrun["scope_sockets"] and not rank["scope_sockets"]


@pytest.mark.parametrize(("use", "expected"), [("none", "none"), ("process", "own"), ("descendants", "descendants")])
def test_thread_names_are_granted_with_accelerators_of_cuda(use, expected, monkeypatch, tmp_path):
    def grant(name):
        monkeypatch.setattr(confinement, "find_accelerator_files", lambda: (tmp_path / name,))
        specification = json.loads(Confinement(accelerators=use).command("program")[3])
        return specification["thread_names"], str(tmp_path / name) in specification["write"]

    assert grant("nvidia0") == (expected, use != "none")
    assert grant("dri") == ("none", use != "none")


@pytest.mark.parametrize(
    "change",
    [
        {"write": "/"},
        {"bind": [True]},
        {"connect": [80.0]},
        {"is_server": "false"},
        {"signal": "SIG_IGN"},
        {"signal": []},
        {"thread_names": "all"},
        {"user": {}},
        {"uid": -1},
        {"niceness": 20},
        {"niceness": True},
    ],
)
def test_wrong_type_or_value_in_a_specification_stops_the_start(change):
    text = Confinement().command("program")[3]
    with pytest.raises(ValueError, match=next(iter(change))):
        ConfinementSpec.from_json(json.dumps({**json.loads(text), **change}))


def test_repeated_field_in_a_specification_stops_the_start():
    text = Confinement().command("program")[3]
    with pytest.raises(TypeError, match="repeated"):
        ConfinementSpec.from_json(text[:-1] + ', "uid": 0}')


@pytest.mark.parametrize("leads_session", [True, False])
def test_process_of_low_priority_lowers_a_session_only_if_it_leads_it(leads_session):
    code = "import os; print(os.nice(0)); f = '/proc/self/autogroup'; print(os.path.exists(f) and open(f).read())"
    command = Confinement(niceness=7).command(sys.executable, "-c", code)
    result = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=leads_session)
    niceness, autogroup = result.stdout.splitlines()[:2]
    assert int(niceness) == min(19, os.nice(0) + 7)
    assert autogroup == "False" or autogroup.endswith("nice 7") == leads_session
