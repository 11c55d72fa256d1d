"""The end of a port's connections."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from contextlib import suppress

import psutil


def close_connections(ports: Collection[int]) -> None:
    """Ends what this process has on its own ports, first those who listen; what has been written still arrives.

    Callers find the connection closed, which is Unavailable to them. A gRPC server that stops by itself ends calls that
    reach it on an open connection as Cancelled.
    """
    for listening in (True, False):
        for connection in psutil.Process().net_connections("tcp"):
            if connection.laddr.port in ports and (connection.status == psutil.CONN_LISTEN) is listening:
                with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as end:
                    end.shutdown(socket.SHUT_RDWR)
