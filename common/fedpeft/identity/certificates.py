"""Certificates as they are read: whom they speak for, until when, and whether it is time for another."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from fedpeft import text_files
from fedpeft.errors import IdentityInvalid
from fedpeft.identity.subject import Subject


def load(path: Path) -> list[x509.Certificate]:
    """Reads a file of certificates, the bearer's own first.

    Raises:
        IdentityInvalid: If the file cannot be read or holds none.
    """
    try:
        return parse(text_files.read_bytes(path))
    except OSError as error:
        raise IdentityInvalid(f"{path} cannot be read: {error.strerror}") from None
    except text_files.NotText as error:
        raise IdentityInvalid(f"{path} holds no certificate: {error}") from None
    except IdentityInvalid as error:
        raise IdentityInvalid(f"{path}: {error.message}") from None


def parse(pem: bytes) -> list[x509.Certificate]:
    """Returns the certificates of a PEM text, at least one.

    Raises:
        IdentityInvalid: If it is not such a text.
    """
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise IdentityInvalid("this holds no certificate in PEM form") from None


def to_pem(*certificates: x509.Certificate) -> bytes:
    """Returns certificates as one PEM text."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def subject(certificate: x509.Certificate) -> Subject:
    """Returns whom a certificate speaks for.

    Raises:
        IdentityInvalid: If its subject alternative names have not exactly one URI, or that is no id of FedPEFT.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        uris = []
    if len(uris) != 1:
        raise IdentityInvalid(
            f"the certificate of {certificate.subject.rfc4514_string()[:200]!r} must have exactly one URI among its "
            "subject alternative names, of the form spiffe://DOMAIN/fedpeft/ROLE/NAME"
        )
    return Subject.of_id(uris[0])


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Returns the host names and addresses of a server's certificate, in their order; none where it names none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def fingerprint(certificate: x509.Certificate) -> str:
    """Returns the SHA-256 of a certificate in 64 hexadecimal digits, what a person compares."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def renewal(certificate: x509.Certificate) -> datetime:
    """Returns when to ask for another: half-way through, so that a failure leaves as long again to try."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begin + (end - begin) / 2


def is_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Returns True if another is to be made: past its half, or not begun, for it was made while the clock was ahead."""
    return not certificate.not_valid_before_utc <= now < renewal(certificate)


def may_sign(certificate: x509.Certificate) -> bool:
    """Returns True if a certificate is an authority's, which may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def check_time(certificate: x509.Certificate, now: datetime) -> None:
    """Checks that a certificate is valid at `now`.

    Raises:
        IdentityInvalid: If it has ended, or does not begin yet, which only a wrong clock can mean.
    """
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise IdentityInvalid(
            f"the certificate ended at {end:%Y-%m-%d %H:%M} UTC, and this machine's clock says {now:%Y-%m-%d %H:%M}; "
            "enroll again with a new token, or, as an operator on the server's machine, run fedpeft-server init again; "
            "if the clock is ahead, set the clock"
        )
    if now < begin:
        raise IdentityInvalid(
            f"the certificate begins at {begin:%Y-%m-%d %H:%M} UTC and this machine's clock says {now:%Y-%m-%d %H:%M}; "
            "set the clock"
        )
