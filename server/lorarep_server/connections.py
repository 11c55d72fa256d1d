"""Connections of this process: how many a port may have, in all and from one address, and how they are closed."""

from __future__ import annotations

import os
import resource
import socket
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from ipaddress import IPv6Address, ip_address, ip_network

import psutil

MOST_DESCRIPTORS = 65_536
"""Open files and connections that a process is made ready for."""


class ConnectionLimit:
    """Counts the open connections of a port. One address has a part of them at most, and leaves the rest to others."""

    def __init__(self, most: int, most_per_address: int) -> None:
        """
        Args:
            most: most connections in all.
            most_per_address: most connections from one IPv4 address, or from one /64 of IPv6.
        """
        self._most = most
        self._most_per_address = most_per_address
        self._open: Counter[str] = Counter()
        self._total = 0

    def enter(self, address: str) -> bool:
        """Counts a connection from an address; False, and not counted, if it is one too many."""
        network = _network(address)
        if self._total >= self._most or self._open[network] >= self._most_per_address:
            return False
        self._open[network] += 1
        self._total += 1
        return True

    def leave(self, address: str) -> None:
        """Counts a connection no longer."""
        network = _network(address)
        self._total -= 1
        self._open[network] -= 1
        if not self._open[network]:
            del self._open[network]


def raise_descriptor_limit() -> int:
    """Raises this process's own limit of open files as far as it may, to MOST_DESCRIPTORS at most. Returns the limit.

    Service managers start processes with 1,024, for programs that use `select`, and let them raise it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a system may have a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MOST_DESCRIPTORS)


def close_connections(ports: Collection[int]) -> None:
    """Closes all sockets of this process on its own ports, listening ones first. Written data still arrives.

    A closed connection is Unavailable to callers. A gRPC server that stops by itself would end calls that arrive on an
    open connection as Cancelled.
    """
    for listening in (True, False):
        for connection in psutil.Process().net_connections("tcp"):
            if connection.laddr.port in ports and (connection.status == psutil.CONN_LISTEN) is listening:
                with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as end:
                    end.shutdown(socket.SHUT_RDWR)


def _network(address: str) -> str:
    """What counts as one address: of IPv6 the /64, which one machine has whole."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:  # no address of IP
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(ip_network((parsed, 64), strict=False))
    return str(parsed)
