"""Run a program confined: `python -I child.py JSON PROGRAM ARGUMENT...`; `infra.confinement` writes the JSON.

In this order: change the user (`user`), drop every capability, set no_new_privs, restrict files, ports and signals with
Landlock, ask the kernel for `signal` when the parent dies, and replace this process by the program.

`user` says how root's privileges are given up, which PostgreSQL demands:

- `same`: the user stays; root loses its capabilities.
- `namespace`: the process looks like `uid` inside a user namespace of its own, and is still the caller outside.
- `search`, `override`: it becomes `uid` and keeps one capability, to enter folders that only root may enter; where user
  namespaces are forbidden.

This file runs alone, before any package is importable.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import stat
import struct
import sys
from typing import Any

CAPABILITIES = {"override": 1, "search": 2}  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 24, 28, 38, 47
NO_SETUID_FIXUP = 4  # without it access(2), which PostgreSQL calls, ignores the capability
CLONE_NEWUSER = 0x10000000
OPEN_FILES = 65_536
LAST_CAPABILITY = 63

# Landlock: system calls (the same numbers on every architecture), and access rights of linux/landlock.h.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
GET_VERSION, PATH_BENEATH, NET_PORT = 1, 1, 2
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
CHANGES = sum(1 << bit for bit in (4, 5, 7, 8, 9, 10, 12))  # remove and make folders, files, sockets, FIFOs, links
DEVICES = 1 << 6 | 1 << 11  # make device files: never granted
MAKE_SOCKET = 1 << 9
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # what a rule about a single file may hold
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = WRITE_FILE | READ_FILE | READ_DIR | CHANGES | REFER | TRUNCATE | IOCTL_DEV  # and no EXECUTE
BIND_TCP, CONNECT_TCP = 1, 2
SCOPE_ABSTRACT_SOCKETS, SCOPE_SIGNALS = 1, 2

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def change_user(uid: int, capability: int) -> None:
    """Change to uid and keep exactly one capability, across exec too."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    check(libc.prctl(PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0), "securebits")
    os.setresuid(uid, uid, uid)
    set_capabilities(1 << capability)
    check(libc.prctl(PR_CAP_AMBIENT, 2, capability, 0, 0), "ambient capability")


def set_capabilities(bits: int) -> None:
    header, data = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", bits, bits, bits, 0, 0, 0)
    check(libc.capset(header, data), "capset")


def drop_capabilities() -> None:
    """Give up all capabilities. With no_new_privs, an exec as root does not bring them back."""
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused where we may not, and then not needed
    set_capabilities(0)


def enter_user_namespace(uid: int) -> None:
    """Map the current user to uid in a new user namespace."""
    user, group = os.geteuid(), os.getegid()
    check(libc.unshare(CLONE_NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {user} 1"), ("gid_map", f"{uid} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def landlock_version() -> int:
    """The kernel's Landlock ABI; 0 where it has none or it is switched off."""
    return max(0, int(libc.syscall(CREATE_RULESET, None, 0, GET_VERSION)))


def restrict(spec: dict[str, Any]) -> None:
    """Allow only the files, folders, TCP ports and signal targets of the specification, as far as the kernel can."""
    version = landlock_version()
    if version == 0:
        return
    known = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    net = BIND_TCP | CONNECT_TCP if version >= 4 and spec["connect"] is not None else 0
    scoped = SCOPE_ABSTRACT_SOCKETS if version >= 6 else 0
    if version >= 6 and spec["scope_signals"]:
        scoped |= SCOPE_SIGNALS
    handled = (READ | WRITE | DEVICES) & known
    attributes = struct.pack("=QQQ", handled, net, scoped)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = check(libc.syscall(CREATE_RULESET, attributes, len(attributes), 0), "landlock ruleset")
    for path in spec["read"]:
        allow_path(ruleset, path, READ & known)
    for path in spec["write"]:
        allow_path(ruleset, path, WRITE & known)
    for path in spec["list"]:
        allow_path(ruleset, path, READ_DIR)
    for path in spec["sockets"]:
        allow_path(ruleset, path, MAKE_SOCKET)
    if net:
        for right, ports in ((BIND_TCP, spec["bind"]), (CONNECT_TCP, spec["connect"])):
            for port in ports:
                rule = struct.pack("=QQ", right, port)
                check(libc.syscall(ADD_RULE, ruleset, NET_PORT, rule, 0), f"landlock port {port}")
    check(libc.syscall(RESTRICT_SELF, ruleset, 0), "landlock")
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
    check(libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0), f"landlock {path}")
    os.close(descriptor)


def raise_file_limit() -> None:
    """Raise the limit of open files: a thousand callers need a thousand, and many systems grant fewer by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    spec, command = json.loads(sys.argv[1]), sys.argv[2:]
    raise_file_limit()
    if spec["user"] == "namespace":
        enter_user_namespace(spec["uid"])  # its capabilities count inside only, and end with the exec
    elif spec["user"] in CAPABILITIES:
        change_user(spec["uid"], CAPABILITIES[spec["user"]])
    elif os.geteuid() == 0:
        drop_capabilities()
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    restrict(spec)
    # After the change of user, which clears it.
    check(libc.prctl(PR_SET_PDEATHSIG, getattr(signal, spec["signal"]), 0, 0, 0), "parent death signal")
    os.umask(0o077)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
