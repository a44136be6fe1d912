"""Peers: the address that a call or a connection comes from, as bounds count it."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from urllib.parse import unquote

FORWARDED_KEY = "fedpeft-peer"
"""Metadata in which the process for enrolment says where a call comes from; believed on its own socket only."""

_PREFIX_BITS = 64
"""Bits of an IPv6 address that count: one machine has all addresses of such a network as a rule."""


def address_of(peer: str) -> str:
    """Returns the address in what gRPC calls a peer, for example 10.0.0.7 for ipv4:10.0.0.7:49152.

    An IPv6 address is cut to its network. What is no address stays as it is.
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    return of_host(rest.rpartition(":")[0].strip("[]"))


@lru_cache(maxsize=4096)  # it is asked for in every call, and clients call again and again
def of_host(host: str) -> str:
    """Returns the address of a host as bounds count it."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, _PREFIX_BITS), strict=False))
    return str(address)
