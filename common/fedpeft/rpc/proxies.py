"""The HTTP proxy between this machine and a server, where the environment names one: CONNECT, then end-to-end bytes.

Read from HTTPS_PROXY (with a certificate) or HTTP_PROXY (plain text), else ALL_PROXY, in small letters too; NO_PROXY
lists hosts and domains that are reached directly. What is on this machine always is.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from fedpeft.errors import SettingsInvalid
from fedpeft.process.addresses import Address

DEFAULT_PORT = 3128


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy.

    Attributes:
        address: Address that it listens on.
        credentials: USER:PASSWORD in clear text; empty if it wants none.
    """

    address: Address
    credentials: str = ""

    @property
    def url(self) -> str:
        """The proxy as gRPC wants it."""
        sign = f"{self.credentials}@" if self.credentials else ""
        return f"http://{sign}{self.address}"

    def request(self, server: str) -> bytes:
        """Returns the bytes that ask for a connection to HOST:PORT."""
        lines = [f"CONNECT {server} HTTP/1.1", f"Host: {server}"]
        if self.credentials:
            sign = base64.b64encode(unquote(self.credentials).encode()).decode()
            lines.append(f"Proxy-Authorization: Basic {sign}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def proxy_of(server: Address, *, secured: bool) -> Proxy | None:
    """Returns the proxy on the way to a server; None if it is reached directly.

    Args:
        server: Address of the server.
        secured: True if it is called over TLS.

    Raises:
        SettingsInvalid: If the variable does not hold http://[USER:PASSWORD@]HOST[:PORT].
    """
    if server.is_loopback or not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    from urllib import request  # and with it `http` and `email`, which a command would wait for

    named = request.getproxies_environment()
    found = named.get("https" if secured else "http") or named.get("all")
    return None if not found or request.proxy_bypass(server.host) else _parsed(found)


def _parsed(text: str) -> Proxy:
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        shown = text.rpartition("@")[2][:200]  # without a password
        raise SettingsInvalid(
            f"the proxy {shown!r} that HTTPS_PROXY, HTTP_PROXY or ALL_PROXY names is not http://HOST:PORT; correct the "
            "variable, or name the server in NO_PROXY"
        )
    credentials = parts.netloc.rpartition("@")[0]
    return Proxy(Address(parts.hostname, port), credentials)
