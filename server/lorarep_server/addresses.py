"""Addresses that servers listen at, written HOST:PORT."""

from __future__ import annotations

from ipaddress import ip_address


def split_address(address: str) -> tuple[str, str]:
    """The host and the port of "HOST:PORT" as text; the brackets of an IPv6 host are taken away.

    A missing host is empty. The port may be something else than a number.
    """
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), port


def parse_address(address: str) -> tuple[str, int]:
    """The host and the port of "HOST:PORT". An empty host stands for every interface.

    Raises:
        ValueError: there is no port, it is no number of 16 bits, or an IPv6 host has no brackets.
    """
    host, port = split_address(address)
    if ":" not in address or not 0 <= int(port) < 1 << 16 or (":" in host and not address.startswith("[")):
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host, int(port)


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a server that listens at this address. Unknown host names are not loopback.

    Addresses in gRPC's own notation, such as "unix:/run/lorarep.sock", are allowed.
    """
    host, _ = split_address(address)
    return is_loopback_host(host) or address.startswith("unix:")


def is_loopback_host(host: str) -> bool:
    """Whether a host, without a port and without brackets, is this machine for itself alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
