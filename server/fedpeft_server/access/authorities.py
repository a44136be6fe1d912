"""The authorities of a server: the one that signs its own certificate, and the one that signs everybody else's.

They are the same, except while the authority is being replaced. Then both are trusted; the old one still signs the
server's certificate, which devices that have not renewed yet trust by it, and the new one signs theirs as they renew.
Every step of `rotate` and `finish` leaves files that can be read: a crash between two is mended by the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedpeft.errors import SettingsInvalid
from fedpeft.identity import certificates, keys
from fedpeft.identity.authority import Authority
from fedpeft.process import durable
from fedpeft_server.access.files import Files


@dataclass(frozen=True)
class Authorities:
    """The authorities of a folder.

    Attributes:
        trusted: Their certificates, at least one; callers with a certificate of any of them are let in.
        serving: Signs the server's certificate; None if its key is elsewhere.
        issuing: Signs those of everybody else; None likewise.
    """

    trusted: tuple[x509.Certificate, ...]
    serving: Authority | None
    issuing: Authority | None

    @classmethod
    def read(cls, files: Files) -> Authorities:
        """Reads the authorities of a folder.

        Raises:
            IdentityInvalid: If a file is missing, malformed, or a key open to others or not the certificate's.
        """
        trusted = tuple(certificates.load(files.authority))
        serving = _of_key(trusted, files.authority_key) or _of_key(trusted, files.next_key)
        if serving is None and files.authority_key.exists():
            serving = Authority(trusted[0], keys.load(files.authority_key))  # says that they do not belong together
        issuing = _of_key(trusted, files.next_key) if serving else None
        return cls(trusted, serving, issuing or serving)

    @property
    def is_rotating(self) -> bool:
        """True if the authority is being replaced."""
        return (
            self.serving is not None
            and self.issuing is not None
            and self.serving.certificate != (self.issuing.certificate)
        )

    def issuer(self, certificate: x509.Certificate) -> x509.Certificate:
        """Returns the authority that issued a certificate; the first one if none of them did, as with intermediates."""
        return next((one for one in self.trusted if issued(one, certificate)), self.trusted[0])


def rotate(files: Files, given: Authority | None = None) -> Authority:
    """Begins to replace the authority, and returns the new one; begun already, returns that.

    Args:
        files: The server's folder.
        given: The new authority; made if absent.

    Raises:
        SettingsInvalid: If the authority's key is elsewhere, or another one is being introduced.
        IdentityInvalid: As `Authorities.read`.
        StateInvalid: If the folder cannot be written.
    """
    now = Authorities.read(files)
    if now.serving is None or now.issuing is None:
        raise SettingsInvalid(
            f"{files.folder} has no authority.key: the certificates come from an authority elsewhere, which is "
            "replaced there; add its new certificate to authority.pem here and at every device, and remove the old one "
            "later"
        )
    if now.is_rotating:
        if given and given.certificate != now.issuing.certificate:
            raise SettingsInvalid(
                f"{files.folder} is being moved to another authority already; finish that first (fedpeft-server "
                "authority finish)"
            )
        return now.issuing
    if given and given.certificate == now.serving.certificate:
        raise SettingsInvalid("--authority is the authority that is in use already; name the new one")
    new = given or Authority.make("FedPEFT authority")
    with durable.refusals(f"writing {files.folder}"):
        durable.write(files.next_key, keys.to_pem(new.key))
        durable.write(files.authority, certificates.to_pem(*now.trusted, new.certificate))
    return new


def finish(files: Files) -> None:
    """Drops the old authority; the server's certificate must be the new one's already.

    Raises:
        SettingsInvalid: If no authority is being replaced.
        IdentityInvalid: As `Authorities.read`.
        StateInvalid: If the folder cannot be written.
    """
    now = Authorities.read(files)
    if now.serving is None or now.issuing is None or not files.next_key.exists():
        raise SettingsInvalid(
            f"no authority is being replaced in {files.folder}; begin with fedpeft-server authority rotate"
        )
    old = now.serving.certificate if now.is_rotating else None
    with durable.refusals(f"writing {files.folder}"):
        if old and old not in (before := replaced(files)):
            durable.write(files.replaced, certificates.to_pem(*before, old))
        durable.write(files.authority, certificates.to_pem(*(one for one in now.trusted if one != old)))
        durable.write(files.authority_key, keys.to_pem(now.issuing.key))
        files.next_key.unlink()
        durable.sync(files.folder)


def replaced(files: Files) -> list[x509.Certificate]:
    """Returns the authorities that were replaced, oldest first.

    Raises:
        IdentityInvalid: If their file is malformed.
    """
    return certificates.load(files.replaced) if files.replaced.exists() else []


def _of_key(trusted: Sequence[x509.Certificate], path: Path) -> Authority | None:
    """Returns the authority whose key is in a file; None without the file, or if none of the certificates is its."""
    if not path.exists():
        return None
    key = keys.load(path)
    mine = next((one for one in trusted if one.public_key() == key.public_key()), None)
    return Authority(mine, key) if mine else None


def issued(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    """Returns True if an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
