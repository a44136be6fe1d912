"""Addresses at which a server listens, or is reached."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Self

LAST_PORT = 65_535

_FORM = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([^:/\s\[\]]+)):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Address:
    """HOST:PORT.

    Attributes:
        host: A name, or an IPv4 or IPv6 address, without brackets.
        port: 1 to 65535; 0 asks for a free one, where that was allowed.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, free: bool = False) -> Self:
        """Reads HOST:PORT; an IPv6 address stands in brackets.

        Args:
            text: The given address.
            free: True if port 0 is allowed.

        Raises:
            ValueError: If it is not of that form.
        """
        match = _FORM.fullmatch(text)
        if not match or not (0 if free else 1) <= int(match[3]) <= LAST_PORT:
            raise ValueError(f"{text!r} is not HOST:PORT, for example 127.0.0.1:7070")
        return cls(match[1] or without_root(match[2]), int(match[3]))

    @property
    def is_loopback(self) -> bool:
        """True if only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_every(self) -> bool:
        """True if it is every address of this machine, which only a server can be told to listen on."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


def without_root(host: str) -> str:
    """Returns a host name without the dot of the root at its end, which no certificate has."""
    return host.removesuffix(".") if len(host) > 1 else host


def check_endpoint(text: str) -> str:
    """Checks http://HOST:PORT or https://HOST:PORT, and returns it.

    Raises:
        ValueError: If it is not of that form.
    """
    scheme, _, rest = text.partition("://")
    if scheme not in ("http", "https"):
        raise ValueError(f"{text!r} is not http://HOST:PORT or https://HOST:PORT")
    Address.parse(rest)
    return text
