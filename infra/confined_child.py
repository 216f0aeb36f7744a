"""Run a program confined: `python -I confined_child.py JSON PROGRAM ARGUMENT...`; `infra.confinement` writes the JSON.

The JSON is a `ConfinementSpec`. The steps, in this order: protect /proc (`thread_names`), change the user (`user`),
drop every capability, set no_new_privs, lower the priority (`niceness`), restrict files, ports and signals with
Landlock, request `signal` for the parent's death, refuse with seccomp the system calls that Landlock does not restrict,
and replace this process by the program.

This file runs alone, before any package can be imported, so it imports the standard library only.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import socket
import stat
import struct
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

CAPABILITIES = {"override": 1, "search": 2}  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
PR_SET_PDEATHSIG = 1
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
SECBIT_NO_SETUID_FIXUP = 4  # without it access(2), which PostgreSQL calls, ignores the capability
CLONE_NEWUSER = 0x10000000
CLONE_NEWNS = 0x00020000
MS_NO_SUID = 2
MS_NO_DEVICES = 4
MS_NO_EXEC = 8
MS_BIND = 1 << 12
MS_RECURSIVE = 1 << 14
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MOUNT_SETATTR = 442  # the system call's number, the same on every architecture
MOUNT_READ_ONLY = 1
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
MAX_OPEN_FILES = 65_536
LAST_CAPABILITY = 63
MAX_NICENESS = 19

# Landlock: system calls (the same numbers on every architecture), and access rights of linux/landlock.h.
CREATE_RULESET = 444
ADD_RULE = 445
RESTRICT_SELF = 446
GET_VERSION = 1
PATH_BENEATH = 1
NET_PORT = 2
EXECUTE_RIGHT = 1 << 0
WRITE_FILE_RIGHT = 1 << 1
READ_FILE_RIGHT = 1 << 2
READ_DIR_RIGHT = 1 << 3
CHANGE_RIGHTS = sum(1 << bit for bit in (4, 5, 7, 8, 9, 10, 12))  # remove and create folders, files, sockets, ...
MAKE_DEVICE_RIGHTS = 1 << 6 | 1 << 11  # create device files: never granted
MAKE_SOCKET_RIGHT = 1 << 9
REFER_RIGHT = 1 << 13
TRUNCATE_RIGHT = 1 << 14
IOCTL_DEV_RIGHT = 1 << 15
# The rights that a rule for a single file may contain.
FILE_RIGHTS = EXECUTE_RIGHT | WRITE_FILE_RIGHT | READ_FILE_RIGHT | TRUNCATE_RIGHT | IOCTL_DEV_RIGHT
READ_RIGHTS = EXECUTE_RIGHT | READ_FILE_RIGHT | READ_DIR_RIGHT
# Without EXECUTE_RIGHT: programs in a writable folder cannot be executed.
WRITE_RIGHTS = (
    WRITE_FILE_RIGHT | READ_FILE_RIGHT | READ_DIR_RIGHT | CHANGE_RIGHTS | REFER_RIGHT | TRUNCATE_RIGHT | IOCTL_DEV_RIGHT
)
BIND_TCP = 1
CONNECT_TCP = 2
SCOPE_ABSTRACT_SOCKETS = 1
SCOPE_SIGNALS = 2

# seccomp: the audit architecture and the numbers of the system calls, x86_64 before aarch64.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SYSTEM_CALLS = {
    "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "socket": (41, 198), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "open_by_handle_at": (304, 265),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "bpf": (321, 280), "seccomp": (317, 277),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "socketpair": (53, 199), "setsid": (112, 157), "setpgid": (109, 154),
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semctl": (66, 191),
    "semop": (65, 193), "semtimedop": (220, 192), "msgget": (68, 186), "msgctl": (71, 187), "msgsnd": (69, 189),
    "msgrcv": (70, 188),
}  # fmt: skip
REFUSED_CALLS = (
    *("add_key", "request_key", "keyctl", "ptrace", "process_vm_readv", "process_vm_writev", "open_by_handle_at"),
    *("kexec_load", "kexec_file_load", "bpf", "perf_event_open", "userfaultfd"),
)
SYSTEM_V_CALLS = (
    *("shmget", "shmat", "shmctl", "semget", "semctl", "semop", "semtimedop"),
    *("msgget", "msgctl", "msgsnd", "msgrcv"),
)
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_GET_ACTION_AVAIL = 2
# BPF instructions on a 32-bit word.
BPF_LOAD = 0x20
BPF_AND = 0x54
BPF_EQUAL = 0x15
BPF_NOT_LESS = 0x35
BPF_RETURN = 0x06
SECCOMP_ALLOW = 0x7FFF0000
SECCOMP_ERRNO = 0x00050000
# Offsets of the fields of struct seccomp_data.
NUMBER_OFFSET = 0
ARCHITECTURE_OFFSET = 4
ARGUMENTS_OFFSET = 16
FIRST_X32_CALL = 0x40000000  # on x86_64, numbers from here on are the x32 ABI's
ALL_BITS_MASK = 0xFFFFFFFF
SOCKET_TYPE_MASK = 0xF
MSG_FASTOPEN = 0x20000000
PRIO_PROCESS = 0
IOPRIO_WHO_PROCESS = 1

BpfInstruction = tuple[int, int, int, int]  # code, instructions to skip if true, and if false, operand
ArgumentTest = tuple[int, int, tuple[int, ...]]  # argument's index, the bits that count, their allowed values
UserChange = Literal["same", "namespace", "search", "override"]
ThreadNameAccess = Literal["none", "own", "descendants"]

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class ConfinementSpec:
    """Define what a process may access, with every path and every right stated. No field has a default.

    Attributes:
        read: files and folders that may be read and executed.
        write: files and folders that may be read and changed; programs in them cannot be executed.
        list_folders: folders whose entries may be listed, at every depth.
        sockets: folders where the process may create Unix sockets, and nothing else.
        thread_names: the threads that it may name. CUDA needs this to start: its driver writes
            /proc/<pid>/task/<tid>/comm and fails with error 304 if it may not.

            - `none`: nothing in /proc may be written.
            - `own`: files of the threads of this process, which keeps its process id.
            - `descendants`: Landlock knows no patterns, so this includes all of /proc that the user may write. For root
              that is more than processes, so the process gets a procfs of its own, where all else is read-only. Where
              that is impossible and something else may be written, the right is refused.
        bind: TCP ports on which it may listen.
        connect: TCP ports to which it may connect; None leaves the network unrestricted, `bind` included.
        is_server: true if it serves clients on an inherited socket. It then cannot pass the socket to other processes,
            so it may not create Unix sockets, and cannot leave its process group.
        system_v: true if it may use System V shared memory, which PostgreSQL needs to prevent a second instance.
        scope_signals: true if it may send signals only to processes in the same confinement.
        scope_sockets: true if it may connect to abstract Unix sockets only of processes in the same confinement.
        signal: name of the signal that the process receives when its parent exits for any reason.
        user: how root's privileges are dropped, which PostgreSQL requires.

            - `same`: the user stays the same; root loses its capabilities.
            - `namespace`: the process has `uid` inside its own user namespace, and is still the calling user outside.
            - `search`, `override`: the process changes to `uid` and keeps one capability, to enter folders that only
              root may enter; used where user namespaces are forbidden.
        uid: the new user id; not used with `same`.
        niceness: from 0 to 19, by which the process and its children come after others for a processor.
    """

    read: Sequence[str]
    write: Sequence[str]
    list_folders: Sequence[str]
    sockets: Sequence[str]
    thread_names: ThreadNameAccess
    bind: Sequence[int]
    connect: Sequence[int] | None
    is_server: bool
    system_v: bool
    scope_signals: bool
    scope_sockets: bool
    signal: str
    user: UserChange
    uid: int
    niceness: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ConfinementSpec":
        """Read the fields from JSON.

        Raises:
            TypeError: if a field is missing, unknown or repeated, so that nothing starts with a rule left out.
            ValueError: if a field has another type or value than it may have.
        """
        spec = cls(**json.loads(text, object_pairs_hook=_refuse_repeated_fields))
        for name in ("read", "write", "list_folders", "sockets"):
            _check_field(name, _is_list_of(getattr(spec, name), str))
        for name in ("is_server", "system_v", "scope_signals", "scope_sockets"):
            _check_field(name, isinstance(getattr(spec, name), bool))
        _check_field("bind", _is_list_of(spec.bind, int))
        _check_field("connect", spec.connect is None or _is_list_of(spec.connect, int))
        _check_field("thread_names", spec.thread_names in get_args(ThreadNameAccess))
        _check_field("user", spec.user in get_args(UserChange))
        _check_field("uid", type(spec.uid) is int and spec.uid >= 0)
        _check_field("niceness", type(spec.niceness) is int and 0 <= spec.niceness <= MAX_NICENESS)
        _check_field("signal", isinstance(spec.signal, str) and spec.signal in signal.Signals.__members__)
        return spec


def _is_list_of(value: object, item_type: type) -> bool:
    return isinstance(value, list) and all(type(item) is item_type for item in value)


def _check_field(name: str, is_valid: bool) -> None:
    if not is_valid:
        raise ValueError(f"{name} of a confinement has a wrong type or value; nothing is started")


def _refuse_repeated_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise TypeError("a field of a confinement is repeated; nothing is started")
    return fields


def check_result(result: int, operation: str) -> int:
    """Return the result of a call of the C library.

    Raises:
        OSError: if it is negative, with the operation's name and the text of errno.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{operation}: {os.strerror(number)}")
    return result


def change_user(uid: int, capability: int) -> None:
    """Change to uid and keep exactly one capability, which survives an exec."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    check_result(libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0), "securebits")
    os.setresuid(uid, uid, uid)
    set_capabilities(1 << capability)
    check_result(libc.prctl(PR_CAP_AMBIENT, 2, capability, 0, 0), "ambient capability")


def set_capabilities(bits: int) -> None:
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3 of the structure, this process
    data = struct.pack("=6I", bits, bits, bits, 0, 0, 0)  # effective, permitted, inheritable; the upper bits are 0
    check_result(libc.capset(header, data), "capset")


def drop_capabilities() -> None:
    """Drop all capabilities; with no_new_privs, an exec as root does not restore them."""
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails without CAP_SETPCAP, and is then not needed
    set_capabilities(0)


def enter_user_namespace(uid: int) -> None:
    """Map the current user to uid in a new user namespace."""
    user, group = os.geteuid(), os.getegid()
    check_result(libc.unshare(CLONE_NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {user} 1"), ("gid_map", f"{uid} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def protect_kernel_settings() -> None:
    """Mount a procfs of this process's own in which all that is not a process is read-only, also for descendants.

    Landlock ties a rule to a file system: with the procfs of the machine, the rule would also count for its other
    mounts and for descriptors received from other processes. What is mounted below /proc, such as the masks of
    containers, is kept.

    Raises:
        OSError: if this process may not mount.
    """
    check_result(libc.unshare(CLONE_NEWNS), "unshare")
    mount(None, "/", MS_RECURSIVE | MS_SLAVE)
    inner_mounts = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in find_mounts_below_proc()]

    mount("proc", "/proc", MS_NO_SUID | MS_NO_DEVICES | MS_NO_EXEC, kind="proc")
    mount(None, "/proc", MS_PRIVATE)
    for path, descriptor in inner_mounts:
        mount(f"/proc/self/fd/{descriptor}", path, MS_BIND)
        os.close(descriptor)

    attributes = struct.pack("=QQQQ", MOUNT_READ_ONLY, 0, MS_PRIVATE, 0)
    for entry in os.scandir("/proc"):
        if is_of_a_process(entry) or not (entry.is_dir() or os.access(entry.path, os.W_OK)):
            continue
        mount(entry.path, entry.path, MS_BIND | MS_RECURSIVE)
        place = os.fsencode(entry.path)
        result = libc.syscall(MOUNT_SETATTR, AT_FDCWD, place, AT_RECURSIVE, attributes, len(attributes))
        check_result(result, f"read-only {entry.path}")


def find_mounts_below_proc() -> list[str]:
    """Return where something is mounted below /proc, outer mounts first; mounts on demand (autofs) stay hidden."""
    paths = []
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            path, kind = before.split()[4], after.split()[0]
            if path.startswith("/proc/") and not path.split("/")[2].isdigit() and kind != "autofs":
                paths.append(path)
    return paths


def is_of_a_process(entry: "os.DirEntry[str]") -> bool:
    """Return True if an entry of /proc is a process, or a link into the calling one such as `self`."""
    return entry.name.isdigit() or entry.is_symlink()


def mount(source: str | None, target: str, flags: int, *, kind: str | None = None) -> None:
    """Call mount(2).

    Raises:
        OSError: if it fails.
    """
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    check_result(libc.mount(*texts, flags, None), f"mount {target}")


def find_thread_names_path(spec: ConfinementSpec) -> str | None:
    """Return the path beneath which files may be written so that threads can be named; None if that is not granted."""
    if spec.thread_names == "none":
        return None
    if spec.thread_names == "own":
        return "/proc/self/task"
    if os.geteuid() == 0 and (setting := find_writable_setting()):
        print(
            f"{setting} may be written and cannot be protected, so CUDA may not name its threads and will fail with "
            "error 304; run as another user than root, or with CAP_SYS_ADMIN",
            file=sys.stderr,
        )
        return None
    return "/proc"


def find_writable_setting() -> str | None:
    """Return a file of /proc that is not of a process and may be written; None if there is none."""
    for entry in os.scandir("/proc"):
        if is_of_a_process(entry):
            continue
        files = (
            [entry.path]
            if not entry.is_dir()
            else (os.path.join(folder, name) for folder, _, names in os.walk(entry.path) for name in names)
        )
        if writable := next((file for file in files if os.access(file, os.W_OK)), None):
            return writable
    return None


def get_landlock_version() -> int:
    """Return the kernel's Landlock ABI version; 0 if Landlock is missing or disabled."""
    return max(0, int(libc.syscall(CREATE_RULESET, None, 0, GET_VERSION)))


def apply_landlock(spec: ConfinementSpec) -> None:
    """Allow only the files, folders, TCP ports and signal targets of the specification, as far as the kernel can."""
    version = get_landlock_version()
    if version == 0:
        return

    # The kernel rejects bits that its ABI version does not know.
    supported = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    net = BIND_TCP | CONNECT_TCP if version >= 4 and spec.connect is not None else 0
    scoped = SCOPE_ABSTRACT_SOCKETS if version >= 6 and spec.scope_sockets else 0
    if version >= 6 and spec.scope_signals:
        scoped |= SCOPE_SIGNALS
    handled = (READ_RIGHTS | WRITE_RIGHTS | MAKE_DEVICE_RIGHTS) & supported
    attributes = struct.pack("=QQQ", handled, net, scoped)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = check_result(libc.syscall(CREATE_RULESET, attributes, len(attributes), 0), "landlock ruleset")

    for path in spec.read:
        allow_path(ruleset, path, READ_RIGHTS & supported)
    for path in spec.write:
        allow_path(ruleset, path, WRITE_RIGHTS & supported)
    for path in spec.list_folders:
        allow_path(ruleset, path, READ_DIR_RIGHT)
    for path in spec.sockets:
        allow_path(ruleset, path, MAKE_SOCKET_RIGHT)
    if thread_names := find_thread_names_path(spec):
        allow_path(ruleset, thread_names, (WRITE_FILE_RIGHT | TRUNCATE_RIGHT) & supported)
        # While a descriptor refers to it, the kernel keeps the object that the rule belongs to.
        os.set_inheritable(os.open(thread_names, os.O_PATH), True)
    if net:
        for right, ports in ((BIND_TCP, spec.bind), (CONNECT_TCP, spec.connect or ())):
            for port in ports:
                rule = struct.pack("=QQ", right, port)
                check_result(libc.syscall(ADD_RULE, ruleset, NET_PORT, rule, 0), f"landlock port {port}")

    check_result(libc.syscall(RESTRICT_SELF, ruleset, 0), "landlock")
    os.close(ruleset)


def allow_path(ruleset: int, path: str, rights: int) -> None:
    """Grant rights on a file, or on everything beneath a folder; a path that does not exist grants nothing."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return
        raise
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        rights &= FILE_RIGHTS
    rule = struct.pack("=Qi", rights, descriptor)
    check_result(libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0), f"landlock {path}")
    os.close(descriptor)


def has_seccomp() -> bool:
    """Return True if the kernel supports seccomp filters and this file knows the architecture's call numbers."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        return False
    action = struct.pack("=I", SECCOMP_ERRNO)
    return int(libc.syscall(get_call_number("seccomp"), SECCOMP_GET_ACTION_AVAIL, 0, action)) == 0


def get_call_number(name: str) -> int:
    """Return the number of a system call on this machine's architecture."""
    return SYSTEM_CALLS[name][list(ARCHITECTURES).index(os.uname().machine)]


def apply_seccomp(*, is_server: bool, system_v: bool) -> None:
    """Install the system call filter for this process and its future children."""
    if not has_seccomp():
        return
    instructions = build_seccomp_program(is_server=is_server, system_v=system_v)
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(instructions), ctypes.addressof(code))
    check_result(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")


def build_seccomp_program(*, is_server: bool, system_v: bool) -> list[BpfInstruction]:
    """Build the BPF program that decides on each system call.

    It refuses what Landlock has no rule for:

    - changing limits and priorities of other processes of the same user (RLIMIT_CPU can kill a process);
    - TCP connections other than by connect and bind on a TCP socket: MPTCP, SMC, SCTP, MSG_FASTOPEN;
    - io_uring, whose operations bypass seccomp filters;
    - System V memory, semaphores and queues, which all processes of a user share; PostgreSQL may use them;
    - calls that no service needs and that give access to other processes or to large parts of the kernel.

    A server inherits its listening socket, which may also be used by the next process of the service. So it may not
    create Unix sockets that other processes can reach, through which it could pass the socket on, and it may not leave
    its process group, by which the keeper ends it.
    """
    machine = os.uname().machine
    refused, missing = SECCOMP_ERRNO | errno.EPERM, SECCOMP_ERRNO | errno.ENOSYS
    without_effect = SECCOMP_ERRNO  # errno 0: the call returns 0 and does nothing
    program: list[BpfInstruction] = [
        (BPF_LOAD, 0, 0, ARCHITECTURE_OFFSET),
        (BPF_EQUAL, 1, 0, ARCHITECTURES[machine]),  # in 32-bit programs the same numbers mean other calls
        (BPF_RETURN, 0, 0, refused),
        (BPF_LOAD, 0, 0, NUMBER_OFFSET),
    ]
    if machine == "x86_64":
        program += [(BPF_NOT_LESS, 0, 1, FIRST_X32_CALL), (BPF_RETURN, 0, 0, refused)]

    # Limits, scheduling and priorities: only of the calling process, whose pid argument is 0.
    itself = (0, ALL_BITS_MASK, (0,))
    for name in ("prlimit64", "sched_setscheduler", "sched_setparam", "sched_setattr"):
        program += match_call(name, allow_if(itself, otherwise=refused))
    # The C library passes the id of a new thread here, not 0. An error would end programs that bind their threads to
    # cores (OMP_PROC_BIND), so the call succeeds without effect and the threads stay unbound.
    program += match_call("sched_setaffinity", allow_if(itself, otherwise=without_effect))
    for name, process in (("setpriority", PRIO_PROCESS), ("ioprio_set", IOPRIO_WHO_PROCESS)):
        program += match_call(
            name, allow_if((0, ALL_BITS_MASK, (process,)), (1, ALL_BITS_MASK, (0,)), otherwise=refused)
        )

    # Sockets and process groups.
    program += match_call("socket", allow_sockets(otherwise=refused, with_unix=not is_server))
    if is_server:
        # A socket of a datagram pair can be reconnected to the path of another process's socket.
        program += match_call("socketpair", allow_if((1, SOCKET_TYPE_MASK, (socket.SOCK_STREAM,)), otherwise=refused))
        for name in ("setsid", "setpgid"):
            program += match_call(name, [(BPF_RETURN, 0, 0, refused)])
    for name, index in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
        program += match_call(name, allow_if((index, MSG_FASTOPEN, (0,)), otherwise=refused))

    # Calls that are refused with any argument; ENOSYS for io_uring, so that programs fall back to other calls.
    for name in ("io_uring_setup", "io_uring_enter", "io_uring_register"):
        program += match_call(name, [(BPF_RETURN, 0, 0, missing)])
    for name in REFUSED_CALLS if system_v else (*REFUSED_CALLS, *SYSTEM_V_CALLS):
        program += match_call(name, [(BPF_RETURN, 0, 0, refused)])
    return [*program, (BPF_RETURN, 0, 0, SECCOMP_ALLOW)]


def match_call(name: str, instructions: list[BpfInstruction]) -> list[BpfInstruction]:
    """Run instructions, which end in a return, for one system call; the call's number must be loaded."""
    return [(BPF_EQUAL, 0, len(instructions), get_call_number(name)), *instructions]


def allow_if(*tests: ArgumentTest, otherwise: int) -> list[BpfInstruction]:
    """Allow the call if every test holds. Only an argument's low 32 bits are tested: these calls read no more."""
    instructions: list[BpfInstruction] = []
    for index, bits, values in tests:
        instructions += [(BPF_LOAD, 0, 0, ARGUMENTS_OFFSET + 8 * index), (BPF_AND, 0, 0, bits)]
        instructions += [(BPF_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
        instructions.append((BPF_RETURN, 0, 0, otherwise))
    return [*instructions, (BPF_RETURN, 0, 0, SECCOMP_ALLOW)]


def allow_sockets(*, otherwise: int, with_unix: bool) -> list[BpfInstruction]:
    """Allow netlink sockets, TCP and UDP sockets over IPv4 and IPv6, and Unix sockets if `with_unix`."""
    families = (socket.AF_INET, socket.AF_INET6)
    types, protocols = (socket.SOCK_STREAM, socket.SOCK_DGRAM), (0, socket.IPPROTO_TCP, socket.IPPROTO_UDP)
    return [
        (BPF_LOAD, 0, 0, ARGUMENTS_OFFSET),
        *([(BPF_EQUAL, 1, 0, socket.AF_UNIX)] if with_unix else []),
        (BPF_EQUAL, 0, 1, socket.AF_NETLINK),
        (BPF_RETURN, 0, 0, SECCOMP_ALLOW),
        *allow_if(
            (0, ALL_BITS_MASK, families),
            (1, SOCKET_TYPE_MASK, types),
            (2, ALL_BITS_MASK, protocols),
            otherwise=otherwise,
        ),
    ]


def lower_priority(niceness: int) -> None:
    """Let other processes come first, by a niceness from 0 to 19.

    Where the kernel divides the processors by session, niceness counts within a session only; so a process that leads
    a session lowers that as well.
    """
    os.nice(niceness)
    if os.getsid(0) == os.getpid():
        # A kernel that does not divide them by session has no such file.
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as autogroup:
            autogroup.write(str(niceness))


def raise_file_limit() -> None:
    """Raise the soft limit of open files: a thousand clients need a thousand, more than many systems' default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raised = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < raised:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))


def main() -> None:
    spec, command = ConfinementSpec.from_json(sys.argv[1]), sys.argv[2:]
    raise_file_limit()
    if spec.thread_names == "descendants" and os.geteuid() == 0 and get_landlock_version() > 0:
        with contextlib.suppress(OSError):  # without the right to mount; `find_thread_names_path` looks at the result
            protect_kernel_settings()
    if spec.user == "namespace":
        # Its capabilities are valid only inside the namespace, and are lost at the exec.
        enter_user_namespace(spec.uid)
    elif spec.user in CAPABILITIES:
        change_user(spec.uid, CAPABILITIES[spec.user])
    elif os.geteuid() == 0:
        drop_capabilities()
    check_result(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    lower_priority(spec.niceness)  # before Landlock, which protects /proc
    apply_landlock(spec)
    # After the change of user, since that clears the parent death signal.
    check_result(libc.prctl(PR_SET_PDEATHSIG, getattr(signal, spec.signal), 0, 0, 0), "parent death signal")
    apply_seccomp(is_server=spec.is_server, system_v=spec.system_v)
    os.umask(0o077)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
