"""Settings of a console process."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import SettingsInvalid
from fedpeft.process.addresses import Address

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
EVERYWHERE = frozenset({"0.0.0.0", "::"})
"""Hosts that mean every address of the machine, and that no browser can open."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one console.

    Attributes:
        server: HOST:PORT of the federation's server, for people.
        listen: Address at which browsers reach the console; port 0 takes a free one.
        may_write: True if anybody may create, pause, resume and stop runs here.
        names: Host names, beside its addresses, under which browsers may ask for it; links name the first.
        certificate: PEM chain for TLS; None: plain text.
        key: Its private key.
        secured: True if the federation's server wants certificates.
    """

    server: str
    listen: Address
    may_write: bool = True
    names: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    secured: bool = False

    @classmethod
    def checked(
        cls,
        server: str,
        listen: str,
        *,
        read_only: bool = False,
        names: tuple[str, ...] = (),
        certificate: Path | None = None,
        key: Path | None = None,
        insecure: bool = False,
        secured: bool = False,
    ) -> Settings:
        """Reads what the flags said.

        Raises:
            SettingsInvalid: If an address is wrong, a file is missing, or the network would be served in plain text.
        """
        try:
            address = Address.parse(listen, free=True)
        except ValueError as error:
            raise SettingsInvalid(f"--listen: {error}") from None
        if (certificate is None) != (key is None):
            raise SettingsInvalid("--tls-certificate and --tls-key go together; give both or neither")
        for flag, path in (("--tls-certificate", certificate), ("--tls-key", key)):
            if path is not None and not path.is_file():
                raise SettingsInvalid(f"{flag} {path}: there is no such file")
        if not address.is_loopback and certificate is None and not insecure:
            raise SettingsInvalid(
                f"--listen {listen} is reached from the network, and pages with login links would cross it in plain "
                "text; give --tls-certificate and --tls-key, or --insecure if you mean it"
            )
        lower = tuple(name.lower() for name in names)
        return cls(server, address, not read_only, lower, certificate, key, secured)

    @property
    def scheme(self) -> str:
        """Prefix of the console's addresses: scheme, host and port."""
        return "https" if self.certificate else "http"

    @property
    def is_everywhere(self) -> bool:
        """True if it listens on every address of its machine, or container."""
        return self.listen.host in EVERYWHERE

    @property
    def link_host(self) -> str:
        """The host that the printed link names.

        What listens everywhere may be a container, whose name says nothing to a browser outside: there localhost is
        right wherever the port is published.
        """
        if not self.is_everywhere:
            return self.listen.host
        return self.names[0] if self.names else "localhost"

    def is_ours(self, host: str) -> bool:
        """Returns True if a browser may use this host: the console's own, and no name of others (DNS rebinding)."""
        name = host.lower().removeprefix("[").removesuffix("]")
        if name in self.names or name == self.listen.host.lower():
            return True
        if self.listen.is_loopback:
            return name in LOOPBACK_NAMES
        if name == socket.gethostname().lower() or (self.is_everywhere and name in LOOPBACK_NAMES):
            return True
        try:
            ipaddress.ip_address(name)  # an address cannot be made to point elsewhere
        except ValueError:
            return False
        return True
