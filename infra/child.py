"""Run a program as a well-behaved child: `python -I child.py SIGNAL MODE UID COMMAND...`.

The program gets SIGNAL when its parent dies, however that happens. MODE says how it gives up
root, which PostgreSQL refuses to run under:

- `same`: it does not.
- `search`, `override`: it becomes UID and keeps one capability, to walk through folders that
  only root may enter, so that no permission outside our own folder has to change.
- `namespace`: it becomes UID inside a user namespace of its own; for containers whose root
  has no capabilities to keep.

This file runs alone, before any package is importable.
"""

import ctypes
import os
import resource
import signal
import struct
import sys

CAPABILITIES = {"override": 1, "search": 2}  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
PR_SET_PDEATHSIG, PR_SET_SECUREBITS, PR_CAP_AMBIENT = 1, 28, 47
NO_SETUID_FIXUP = 4  # without it access(2), which PostgreSQL asks, forgets the capability
CLONE_NEWUSER = 0x10000000
ENOUGH_FILES = 65_536

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def become(uid: int, capability: int) -> None:
    """Change to uid and keep exactly one capability, over the exec too."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    check(libc.prctl(PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0), "securebits")
    os.setresuid(uid, uid, uid)
    bits = 1 << capability
    header, data = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", bits, bits, bits, 0, 0, 0)
    check(libc.capset(header, data), "capset")
    check(libc.prctl(PR_CAP_AMBIENT, 2, capability, 0, 0), "ambient capability")


def enter_namespace(uid: int) -> None:
    """Map this user to uid in a new user namespace."""
    user, group = os.geteuid(), os.getegid()
    check(libc.unshare(CLONE_NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {user} 1"), ("gid_map", f"{uid} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def raise_file_limit() -> None:
    """A thousand callers are a thousand open files; many systems grant as many only to those who ask."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(ENOUGH_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    last_signal, mode, uid, *command = sys.argv[1:]
    if mode == "namespace":
        enter_namespace(int(uid))
    elif mode in CAPABILITIES:
        become(int(uid), CAPABILITIES[mode])
    raise_file_limit()
    check(libc.prctl(PR_SET_PDEATHSIG, getattr(signal, last_signal), 0, 0, 0), "parent death signal")
    os.umask(0o077)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
