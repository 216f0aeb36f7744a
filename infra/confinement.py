"""Define what a process may access: files, ports, processes, privileges; `infra.confined_child` enforces it.

A compromised service can then read only its own folder, the interpreter and the system's libraries: no other service's
folder, settings or environment, even if both run as the same user.
"""

import os
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from infra import confined_child
from infra.confined_child import ConfinementSpec, ThreadNameAccess, UserChange

CHILD_PROGRAM = Path(confined_child.__file__)
DISTRIBUTION_NAME = "cotrain"
AcceleratorUse = Literal["none", "process", "descendants"]

# Of /etc only what the C library, OpenSSL and Python read; none of these files holds a secret.
SYSTEM_FILES = (
    *("/usr", "/lib", "/lib64", "/bin", "/sbin", "/proc", "/sys"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/os-release"),
    *("/etc/nsswitch.conf", "/etc/hosts", "/etc/host.conf", "/etc/resolv.conf", "/etc/gai.conf"),
    *("/etc/protocols", "/etc/services", "/etc/passwd", "/etc/group", "/etc/localtime", "/etc/timezone"),
    *("/etc/ssl", "/etc/ca-certificates", "/etc/pki", "/etc/mime.types", "/etc/debian_version"),
)
DEVICE_FILES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
SHARED_MEMORY_FOLDER = "/dev/shm"  # collectives of several processes on one machine need it
ACCELERATOR_FILE_PATTERNS = ("nvidia*", "nvidia-caps", "infiniband", "dri", "kfd")
THREAD_NAMES_BY_USE: dict[AcceleratorUse, ThreadNameAccess] = {
    "none": "none",
    "process": "own",
    "descendants": "descendants",
}
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
# A thread of torch that waits for another one sleeps. By default it spins, and where other processes want the
# processor, the one that it waits for is not running: two threads beside one busy process took 15 times as long.
SHARED_PROCESSOR_VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE"}
SAFE_VARIABLES = ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CC", "TORCH_COMPILE_DISABLE")
# Variables that sites set for collectives and accelerators; no platform setting and no credential has these prefixes.
SAFE_VARIABLE_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "CUDA_", "OMP_", "UCX_", "FI_")


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """Define what one process and its children may access.

    Fields that are not listed here have the same meaning as in `infra.confined_child.ConfinementSpec`.

    Attributes:
        read: files and folders that may be read, in addition to the interpreter, this code and the system.
        accelerators: which processes use this machine's accelerators: none, this process alone, or its descendants too.
            They may then write to the device files and, for CUDA, the names of threads.
    """

    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    sockets: tuple[Path, ...] = ()
    bind: tuple[int, ...] = ()
    connect: tuple[int, ...] | None = None
    is_server: bool = False
    system_v: bool = False
    accelerators: AcceleratorUse = "none"
    scope_signals: bool = True
    scope_sockets: bool = True
    signal: str = "SIGTERM"
    user: UserChange = "same"
    uid: int = 0
    niceness: int = 0

    def command(self, program: str, *arguments: str) -> list[str]:
        """Return the command that runs a program under this confinement."""
        accelerator_files = () if self.accelerators == "none" else find_accelerator_files()
        has_cuda = any(path.name.startswith("nvidia") for path in accelerator_files)
        spec = ConfinementSpec(
            read=[*SYSTEM_FILES, *map(str, find_interpreter_folders()), *map(str, self.read)],
            write=[*DEVICE_FILES, *map(str, self.write), *map(str, accelerator_files)],
            list_folders=["/dev"],  # a confined process that confines others must find the accelerator files to grant
            sockets=[str(folder) for folder in self.sockets],
            thread_names=THREAD_NAMES_BY_USE[self.accelerators] if has_cuda else "none",
            bind=self.bind,
            connect=self.connect,
            is_server=self.is_server,
            system_v=self.system_v,
            scope_signals=self.scope_signals,
            scope_sockets=self.scope_sockets,
            signal=self.signal,
            user=self.user,
            uid=self.uid,
            niceness=self.niceness,
        )
        return [sys.executable, "-I", str(CHILD_PROGRAM), spec.to_json(), program, *arguments]


@cache
def find_interpreter_folders() -> tuple[Path, ...]:
    """Return the folders of the running Python, its packages, and this project's packages."""
    # By name: a confined process cannot list the checkout, which may contain the home folder too.
    names = (metadata.distribution(DISTRIBUTION_NAME).read_text("top_level.txt") or "").split()
    packages = [CHILD_PROGRAM.parents[1] / name for name in names]
    folders = [Path(sys.prefix), Path(sys.base_prefix), *packages]
    return tuple(dict.fromkeys(folder.resolve() for folder in folders))


def find_accelerator_files() -> tuple[Path, ...]:
    """Return the device files of this machine's accelerators."""
    return tuple(sorted(path for pattern in ACCELERATOR_FILE_PATTERNS for path in Path("/dev").glob(pattern)))


def is_landlock_enforced() -> bool:
    """Return True if the kernel enforces file confinement (Landlock)."""
    return confined_child.get_landlock_version() > 0


def is_seccomp_enforced() -> bool:
    """Return True if the kernel can refuse the system calls that Landlock does not restrict (seccomp)."""
    return confined_child.has_seccomp()


def build_confined_environment(folder: Path, **values: str) -> dict[str, str]:
    """Build the environment of a process with its own folder as home; only allow-listed variables are inherited."""
    inherited = {
        name: text
        for name, text in os.environ.items()
        if name in SAFE_VARIABLES or name.startswith(SAFE_VARIABLE_PREFIXES)
    }
    fixed: Mapping[str, str] = {
        "PATH": f"{sysconfig.get_path('scripts')}:{SYSTEM_PATH}",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # the code's folder is read-only here
        "PYTHONSAFEPATH": "1",  # modules come from installed packages, never from the working directory
    }
    return {**SHARED_PROCESSOR_VARIABLES, **inherited, **fixed, **values}


def parse_port(url: str) -> int:
    """Return the port of a URL; without one, the scheme's default port.

    >>> parse_port("http://127.0.0.1:8333"), parse_port("https://store.example")
    (8333, 443)
    """
    parts = urlsplit(url)
    return parts.port or {"https": 443, "postgresql": 5432}.get(parts.scheme, 80)
