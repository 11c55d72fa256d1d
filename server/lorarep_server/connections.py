"""Closes the connections of a port."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from contextlib import suppress

import psutil


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
