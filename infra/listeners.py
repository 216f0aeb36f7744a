"""Find which user listens on a TCP address of this machine, so that no secret is sent to another user's listener.

The sockets are read from /proc/net, since psutil does not tell a socket's user.
"""

import contextlib
import errno
import ipaddress
import pwd
import socket
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import urlsplit

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# States in /proc/net/tcp.
TCP_LISTEN = "0A"
TCP_ESTABLISHED = "01"


def open_listener(url: str, *, replaces: socket.socket | None = None) -> socket.socket:
    """Listen on the address of a URL, for a server that will inherit the socket.

    Clients that connect wait until a server accepts them. TCP_NODELAY is set, as asyncio does on its own sockets.

    Args:
        replaces: an open listener of the same address, which the caller closes afterwards. No other user can bind the
            port in between: SO_REUSEPORT lets several sockets of the same user listen.

    Raises:
        PermissionError: if another process listens there already; the message has its user's id and name.
        OSError: if the address cannot be used.
    """
    if replaces is None:
        refuse_foreign_listener(url, ())
    parts = urlsplit(url)
    address_info = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(*address_info[:3])
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        listener.bind(address_info[4])
        listener.listen()
        # With SO_REUSEADDR set, another user could bind the port if the inheriting server stopped listening.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            refuse_foreign_listener(url, ())
        raise OSError(
            error.errno,
            f"cannot listen on {_get_host_and_port(url)}: {error.strerror}",
        ) from error
    return listener


def is_listening(opened: socket.socket) -> bool:
    """Return True if a socket is listening."""
    return bool(opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def require_own_listener(url: str, uids: Collection[int]) -> None:
    """Raise unless one of these users listens on the address of a URL; the URL must have a port.

    Raises:
        ConnectionRefusedError: if there is no listener.
        PermissionError: if another user listens there.
    """
    if not (holders := find_listener_uids(url)):
        raise ConnectionRefusedError(f"nothing listens on {_get_host_and_port(url)} yet")
    refuse_foreign_listener(url, uids, holders)


def refuse_foreign_listener(url: str, uids: Collection[int], holders: Collection[int] | None = None) -> None:
    """Raise if a user other than these listens on the address of a URL.

    Raises:
        PermissionError: with the other user's id and name.
    """
    foreign = set(find_listener_uids(url) if holders is None else holders) - set(uids)
    if foreign:
        names = " and ".join(map(describe_user, sorted(foreign)))
        raise PermissionError(
            f"port {urlsplit(url).port} is held by {names}, and not by this stack; end that program, "
            "or delete the port's line in stack-config.json to have another chosen"
        )


def find_listener_uids(url: str) -> set[int]:
    """Return the users whose sockets receive connections to the address of a URL; empty if there is no listener.

    A socket bound to the exact address takes precedence over one that is bound to all addresses.
    """
    parts = urlsplit(url)
    address_infos = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    addresses = {ipaddress.ip_address(str(socket_address[0])) for *_, socket_address in address_infos}
    listeners = [(address, uid) for address, port, uid in _read_listeners() if port == parts.port]
    exact = {uid for address, uid in listeners if address in addresses}
    return exact or {uid for address, uid in listeners if address.is_unspecified}


def describe_callers(port: int) -> str:
    """Describe how many connections to a port each user of this machine holds, in descending order."""
    counts = Counter(uid for uid, remote_port in _read_callers() if remote_port == port)
    descriptions = [f"{count} by {describe_user(uid)}" for uid, count in counts.most_common()]
    return ", ".join(descriptions) or "none from this machine"


def describe_user(uid: int) -> str:
    """Describe a user by id, and by name if it has one."""
    with contextlib.suppress(KeyError):
        return f"user {uid} ({pwd.getpwuid(uid).pw_name})"
    return f"user {uid}"


def _get_host_and_port(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _read_listeners() -> Iterator[tuple[IpAddress, int, int]]:
    """Yield address, port and user of every listening TCP socket."""
    for fields in _read_sockets(TCP_LISTEN):
        address, port = fields[1].split(":")
        yield _parse_address(address), int(port, 16), int(fields[7])


def _read_callers() -> Iterator[tuple[int, int]]:
    """Yield the local user and the remote port of every established TCP connection."""
    for fields in _read_sockets(TCP_ESTABLISHED):
        yield int(fields[7]), int(fields[2].rpartition(":")[2], 16)


def _read_sockets(state: str) -> Iterator[list[str]]:
    """Yield the fields of this machine's TCP sockets in a state; for the fields see proc_net_tcp."""
    for name in ("tcp", "tcp6"):
        table = Path("/proc/net") / name
        if not table.exists():  # a kernel without IPv6
            continue
        for line in table.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state:
                yield fields


def _parse_address(text: str) -> IpAddress:
    """Parse an address in the kernel's hex format, 32-bit words in host byte order; unmap IPv4-mapped IPv6.

    >>> import sys
    >>> _parse_address("0100007F") if sys.byteorder == "little" else ipaddress.ip_address("127.0.0.1")
    IPv4Address('127.0.0.1')
    """
    packed = b"".join(struct.pack("=I", int(text[start : start + 8], 16)) for start in range(0, len(text), 8))
    if len(packed) == 4:
        return ipaddress.IPv4Address(packed)
    address = ipaddress.IPv6Address(packed)
    return address.ipv4_mapped or address
