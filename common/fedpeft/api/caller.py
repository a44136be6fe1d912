"""As whom an operator calls which server: a named identity, the person's own if it is for that server, or none.

The person's own identity is used for its own server and for no other: what is on this machine, a demonstration for
example, is called in plain text although there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.errors import SettingsInvalid
from fedpeft.process.addresses import Address

if TYPE_CHECKING:
    from fedpeft.identity.folder import Identity

DEFAULT_SERVER = "127.0.0.1:7070"
"""Address of the server when neither it nor an identity is named."""


@dataclass(frozen=True)
class Caller:
    """A caller's server and identity.

    Attributes:
        server: HOST:PORT.
        identity: As whom; None for plain text.
    """

    server: str
    identity: Identity | None


def choose(server: str | None, folder: Path | None, *, insecure: bool) -> Caller:
    """Returns who calls whom.

    Args:
        server: The server that was named, if one was.
        folder: The identity folder that was named, if one was.
        insecure: True for plain text: no identity is used, and it may leave this machine.

    Raises:
        SettingsInvalid: If the server is no address, or plain text would leave this machine.
        IdentityInvalid: If the identity cannot be used.
    """
    address = None if server is None else parsed(server)
    if folder is not None:
        if insecure:
            raise SettingsInvalid(f"--insecure asks for plain text, and --identity {folder} for TLS; leave out one")
        return _with_identity(folder, server)
    personal, own = _own() if not insecure else (None, None)
    if personal is not None and own is not None and (address is None or _same(address, own)):
        return _with_identity(personal, server)
    found = address or Address.parse(DEFAULT_SERVER)
    if not (found.is_loopback or insecure):
        raise SettingsInvalid(
            f"server {found} is not on this machine and there is no identity for it"
            + (f" (the one in {personal} is for {own})" if own else "")
            + ": enroll with a token (fedpeft enroll), name a folder with --identity, or say --insecure for plain text "
            "if the network between is trusted"
        )
    return Caller(server or DEFAULT_SERVER, None)


def parsed(server: str) -> Address:
    """Returns a server's address.

    Raises:
        SettingsInvalid: If it is not HOST:PORT.
    """
    try:
        return Address.parse(server)
    except ValueError as error:
        raise SettingsInvalid(f"--server: {error}") from None


def _with_identity(folder: Path, server: str | None) -> Caller:
    from fedpeft.identity import certificates
    from fedpeft.identity.folder import Identity

    identity = Identity.load(folder)
    certificates.check_time(identity.certificate, datetime.now(UTC))
    return Caller(server or identity.server, identity)


def _own() -> tuple[Path | None, Address | None]:
    """Returns folder and server of the person's own identity, if there is one; a broken one says so when it is used."""
    from fedpeft.identity import folder

    own = folder.personal()
    if own is None or not folder.exists(own):
        return None, None
    return own, Address.parse(folder.server_of(own))


def _same(one: Address, other: Address) -> bool:
    """Returns whether two addresses are one server's.

    Another host is one server, whichever port leads there; this machine has several names and perhaps servers.
    """
    if one.is_loopback and other.is_loopback:
        return one.port == other.port
    return one.host == other.host
