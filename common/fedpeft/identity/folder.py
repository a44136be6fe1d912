"""The identity folder: who a process is, and whom it trusts.

    key.pem           its private key, readable by its owner only
    certificate.pem   its certificate, then any between it and the authority
    authority.pem     the authorities whose word it takes about the server
    identity.toml     server = "HOST:PORT"

The key is written first and the certificate last, so a folder with a certificate is whole. A renewal replaces the
certificate, and before it the authorities, which are two while the server's is being replaced.
Who enrolls into it or renews holds it meanwhile (`lock`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Self

from cryptography import x509

from fedpeft import text_files
from fedpeft.errors import IdentityInvalid, SettingsInvalid
from fedpeft.identity import certificates, keys
from fedpeft.identity.keys import PrivateKey
from fedpeft.identity.subject import Subject
from fedpeft.process import durable
from fedpeft.process.addresses import Address
from fedpeft.process.home import NO_HOME, home_folder


@dataclass(frozen=True)
class Identity:
    """Contents of an identity folder.

    Attributes:
        folder: Folder that it was read from.
        server: HOST:PORT of the server.
        key: The private key.
        chain: The certificate, then any between it and the authority.
        authority: The certificates that are trusted.

    Raises:
        IdentityInvalid: If key and certificate do not belong together.
    """

    folder: Path
    server: str
    key: PrivateKey
    chain: tuple[x509.Certificate, ...]
    authority: tuple[x509.Certificate, ...]

    def __post_init__(self) -> None:
        if self.certificate.public_key() != self.key.public_key():
            raise IdentityInvalid(
                f"{certificate_path(self.folder)} is not the certificate of {key_path(self.folder)}; enroll again with "
                "a new token"
            )

    @cached_property
    def subject(self) -> Subject:
        """The role and name that the certificate speaks for.

        Raises:
            IdentityInvalid: If it names nobody.
        """
        return certificates.subject(self.certificate)

    @property
    def certificate(self) -> x509.Certificate:
        """Its own certificate."""
        return self.chain[0]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads an identity folder; whether the certificate is valid now is not looked at.

        Raises:
            IdentityInvalid: If a file is missing, malformed, or a key open to others.
        """
        return cls(
            folder,
            server_of(folder),
            keys.load(key_path(folder)),
            tuple(certificates.load(certificate_path(folder))),
            tuple(certificates.load(folder / "authority.pem")),
        )


def successor(identity: Identity, now: datetime) -> Identity | None:
    """Returns what has taken an identity's place in its folder: the same one's, not older, valid now, with its key.

    None if nothing has: what is half written, another one's, or out of a backup does not count.
    """
    try:
        found = Identity.load(identity.folder)
        same = found.subject == identity.subject
    except IdentityInvalid:
        return None
    if not same or found.chain == identity.chain:
        return None
    begin, end = _life(found)
    return found if (begin, end) >= _life(identity) and begin <= now <= end else None


def _life(identity: Identity) -> tuple[datetime, datetime]:
    return identity.certificate.not_valid_before_utc, identity.certificate.not_valid_after_utc


def exists(folder: Path) -> bool:
    """Returns True if somebody was enrolled into a folder."""
    return certificate_path(folder).exists()


def key_path(folder: Path) -> Path:
    """Returns the file of the private key."""
    return folder / "key.pem"


def certificate_path(folder: Path) -> Path:
    """Returns the file of the certificate."""
    return folder / "certificate.pem"


def take_key(folder: Path) -> PrivateKey:
    """Returns the key of a folder, made if there is none: an enrolment that broke goes on with the same one.

    Raises:
        IdentityInvalid: If there is one that cannot be used.
        StateInvalid: If the folder cannot be written.
    """
    path = key_path(folder)
    if path.exists():
        return keys.load(path)
    key = keys.make()
    with durable.refusals(f"writing {path}"):
        durable.make_folder(folder, 0o700)
        durable.write(path, keys.to_pem(key))
    return key


def renew(folder: Path, authority: Sequence[x509.Certificate], chain: Sequence[x509.Certificate]) -> None:
    """Replaces the certificate, and before it the authorities that are trusted; none leaves those as they are.

    Raises:
        StateInvalid: If the folder cannot be written.
    """
    with durable.refusals(f"writing {folder}"):
        if authority:
            durable.write(folder / "authority.pem", certificates.to_pem(*authority))
    write_certificate(folder, chain)


def write(folder: Path, server: str, authority: Sequence[x509.Certificate], chain: Sequence[x509.Certificate]) -> None:
    """Writes the rest beside a key, the certificate last.

    Raises:
        StateInvalid: If the folder cannot be written.
    """
    with durable.refusals(f"writing {folder}"):
        durable.write(folder / "identity.toml", f'server = "{Address.parse(server)}"\n'.encode())
        durable.write(folder / "authority.pem", certificates.to_pem(*authority))
    write_certificate(folder, chain)


def write_certificate(folder: Path, chain: Sequence[x509.Certificate]) -> None:
    """Replaces the certificate.

    Raises:
        StateInvalid: If the folder cannot be written.
    """
    with durable.refusals(f"writing {folder}"):
        durable.write(certificate_path(folder), certificates.to_pem(*chain))


def server_of(folder: Path) -> str:
    """Returns the server that a folder is for.

    Raises:
        IdentityInvalid: If its file is missing or malformed.
    """
    path = folder / "identity.toml"
    try:
        server = text_files.toml(text_files.read(path)).get("server")
        return str(Address.parse(server if isinstance(server, str) else ""))
    except OSError as error:
        raise IdentityInvalid(f"{path} cannot be read: {error.strerror}; enroll first") from None
    except text_files.NotText as error:
        raise IdentityInvalid(f"{path} cannot be read: {error}") from None
    except ValueError:
        raise IdentityInvalid(f'{path} must hold server = "HOST:PORT"') from None


def personal() -> Path | None:
    """Returns the folder of a person's own identity; None for a user without a home folder, as in some containers."""
    if configuration := os.environ.get("XDG_CONFIG_HOME"):
        return Path(configuration) / "fedpeft" / "identity"
    home = home_folder()
    return None if home is None else home / ".config" / "fedpeft" / "identity"


def personal_needed(flag: str) -> Path:
    """Returns the folder of a person's own identity.

    Args:
        flag: The flag that names another folder.

    Raises:
        SettingsInvalid: If this user has no home folder.
    """
    if (own := personal()) is None:
        raise SettingsInvalid(f"{NO_HOME}; set HOME, or name a folder with {flag}")
    return own
