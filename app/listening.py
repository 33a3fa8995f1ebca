"""The address to listen on, taken before anything else: where that fails, a sentence says what to do."""

from __future__ import annotations

import errno
import socket


def bind(host: str, port: int, prefix: str = "") -> list[socket.socket]:
    """Sockets that do not listen yet, one for each address of the host, on the same port.

    `prefix` is that of the settings' names: "metrics-" for --metrics-port. Raises ValueError.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise ValueError(f"there is no address {host!r}; --{prefix}host takes one of this machine") from None
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        taken = socket.socket(family, kind, protocol)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            same = sockets[0].getsockname()[1] if sockets else port  # port 0 is another one each time
            taken.bind((address[0], same, *address[2:]))
            sockets.append(taken)
        except OSError as error:
            taken.close()
            failure = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # as of ::1 where there is no IPv6
                break
    if failure and (not sockets or failure.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
        for taken in sockets:
            taken.close()
        raise ValueError(complaint(failure, host, port, prefix))
    return sockets


def complaint(error: OSError, host: str, port: int, prefix: str = "") -> str:
    """Why nothing can listen there, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use: stop what uses it, or choose another one with --{prefix}port"
    if error.errno == errno.EACCES:
        return f"port {port} is for administrators only: choose one above 1023 with --{prefix}port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"this machine has no address {host}; --{prefix}host takes one that it has"
    return f"{host}, port {port} cannot be listened on ({error.strerror}); see --{prefix}host and --{prefix}port"


def url(listener: socket.socket) -> str:
    """http://HOST:PORT of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
