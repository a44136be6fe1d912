"""The certificate authority of a federation: one key that signs for the server, and for everybody who was enrolled."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeft.errors import IdentityInvalid
from fedpeft.identity import certificates, keys
from fedpeft.identity.keys import PrivateKey
from fedpeft.identity.requests import PublicKey
from fedpeft.identity.subject import Subject

SKEW = timedelta(minutes=10)
"""Certificates begin so long before they are made, because the clock of a device may be behind."""
AUTHORITY_LIFE = timedelta(days=3650)


@dataclass(frozen=True)
class Authority:
    """An authority: its certificate and the private key to it.

    Raises:
        IdentityInvalid: If the key is not the certificate's, or the certificate may not sign others.
    """

    certificate: x509.Certificate
    key: PrivateKey

    def __post_init__(self) -> None:
        if self.certificate.public_key() != self.key.public_key():
            raise IdentityInvalid("the authority's key does not belong to its certificate")
        if not certificates.may_sign(self.certificate):
            raise IdentityInvalid("the authority's certificate may not sign others (basic constraints: CA)")

    @classmethod
    def make(cls, name: str) -> Self:
        """Returns a new authority.

        Args:
            name: Name shown in its certificate.
        """
        key = keys.make()
        subject = _common_name(name)
        builder = (
            _begin(subject, subject, key.public_key(), AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    def issue(
        self,
        subject: Subject,
        key: PublicKey,
        life: timedelta,
        at: datetime | None = None,
        *,
        after: datetime | None = None,
    ) -> x509.Certificate:
        """Returns a certificate with which `subject` can call the server.

        Args:
            subject: Subject of the certificate.
            key: The subject's public key.
            life: Validity of the certificate.
            at: Time of issue; now if absent.
            after: It begins after this, to the second; so that it can be told from those that were revoked then.
        """
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(subject.id)])
        return self._sign(subject.name, names, ExtendedKeyUsageOID.CLIENT_AUTH, key, life, at, after)

    def issue_server(
        self, hosts: Sequence[str], key: PublicKey, life: timedelta, at: datetime | None = None
    ) -> x509.Certificate:
        """Returns a certificate for the server.

        Args:
            hosts: Host names and addresses under which clients reach it, at least one.
            key: The server's public key.
            life: Validity of the certificate.
            at: Time of issue, now if absent.

        Raises:
            IdentityInvalid: If a host is neither a name nor an address.
        """
        if not hosts:
            raise IdentityInvalid("a server's certificate needs a host name or address under which it is reached")
        names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys(hosts)])
        return self._sign(hosts[0][:64], names, ExtendedKeyUsageOID.SERVER_AUTH, key, life, at)

    def _sign(
        self,
        name: str,
        names: x509.SubjectAlternativeName,
        purpose: x509.ObjectIdentifier,
        key: PublicKey,
        life: timedelta,
        at: datetime | None = None,
        after: datetime | None = None,
    ) -> x509.Certificate:
        builder = (
            _begin(_common_name(name), self.certificate.subject, key, life, at, after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256())


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    key: PublicKey,
    life: timedelta,
    at: datetime | None = None,
    after: datetime | None = None,
) -> x509.CertificateBuilder:
    now = at or datetime.now(UTC)
    begin = now - SKEW
    if after:
        begin = max(begin, after.replace(microsecond=0) + timedelta(seconds=1))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(now + life)
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def check_host(host: str) -> None:
    """Checks that a server's certificate can be made out to a host.

    Raises:
        IdentityInvalid: If it is neither a host name nor an address.
    """
    _general_name(host)


def _general_name(host: str) -> x509.GeneralName:
    with suppress(ValueError):  # then it is a name
        return x509.IPAddress(ipaddress.ip_address(host))
    labels = host.removeprefix("*.").split(".")
    if len(host) > 253 or not all(_is_label(label) for label in labels):
        raise IdentityInvalid(
            f"{host[:300]!r} is neither a host name nor an address; it is one alone, such as fed.example.org or "
            "192.0.2.7, without scheme, port or path"
        )
    return x509.DNSName(host)


def _is_label(text: str) -> bool:
    """Returns whether a text is one part of a host name; underscores may be in it, as in the names of containers."""
    letters = text.replace("-", "").replace("_", "")
    return text.isascii() and letters.isalnum() and len(text) <= 63 and text.strip("-") == text
