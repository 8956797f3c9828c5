"""The port where peers come, made while privileges for a low one are there. Imports nothing that is slow to load."""

from __future__ import annotations

import re
import socket

from vtpm.errors import UnavailableError, UsageError

_BACKLOG = 64
_PORT = re.compile(r"[1-9][0-9]{0,4}")


def listen(address: str) -> socket.socket:
    """Return a listening socket.

    Args:
        address: HOST:PORT.
    Raises:
        UsageError: it is not of that form. UnavailableError: this host has no such address, or somebody has the port.
    """
    host, _, port = address.rpartition(":")
    if not host or not _PORT.fullmatch(port) or int(port) >= 1 << 16:
        raise UsageError(f"migration_address {address!r} is not HOST:PORT")
    try:
        ((family, _, _, _, where), *_) = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        return socket.create_server(where, family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "this is no name of a host"
        raise UnavailableError(
            f"migration_address {address} cannot be listened on: {why}",
            next_step="Set it to an address of this host and a port that nobody has",
        ) from error
