"""The server's own certificates: what gRPC is given of them, and the authority that issues others.

Notable: the server's certificate is replaced while connections go on, by this server half-way through its life where
it has the authority's key, or by whoever writes a new file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

import grpc
from cryptography import x509

from fedpeft.errors import IdentityInvalid
from fedpeft.identity import certificates, keys
from fedpeft.identity.authority import Authority
from fedpeft.identity.keys import PrivateKey
from fedpeft.process import durable
from fedpeft_server.access.authorities import Authorities
from fedpeft_server.access.files import Files

SERVER_LIFE = timedelta(days=90)

_MOMENT = "%Y-%m-%d %H:%M UTC"


class ServerCertificates:
    """The server's certificate and key as they are now.

    Attributes:
        authorities: The authorities, with their keys where they are here.
        trusted: Fingerprints of those whose certificates are taken.

    Raises:
        IdentityInvalid: If a file is missing, malformed, a key open to others, or the certificate is not the key's.
    """

    def __init__(self, folder: Path) -> None:
        self.files = Files(folder)
        self._seen: tuple[object, ...] = ()
        self._read()

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """Returns the certificates of a folder, None if it was never made ready."""
        return cls(folder) if Files(folder).exist() else None

    @property
    def issuing(self) -> Authority | None:
        """The authority that signs the certificates of everybody else; None if its key is elsewhere."""
        return self.authorities.issuing

    @property
    def root(self) -> x509.Certificate:
        """The authority by which the server's certificate is trusted now."""
        return self.authorities.issuer(self._chain[-1])

    @property
    def certificate(self) -> x509.Certificate:
        """The server's certificate."""
        return self._chain[0]

    @property
    def hosts(self) -> list[str]:
        """The names and addresses in it, the first of which the server is told about by."""
        return certificates.hosts_of(self.certificate)

    def credentials(self, *, ask: bool) -> grpc.ServerCredentials:
        """Returns what gRPC serves a port with; a newer certificate reaches it by itself.

        Args:
            ask: True to demand a client's certificate.
        """
        served = self._version

        def newer() -> grpc.ServerCertificateConfiguration | None:  # called for each handshake, on gRPC's threads
            nonlocal served
            if served == self._version:
                return None
            served = self._version
            return self._configuration(ask=ask)

        # None, for no change, is allowed by gRPC's documentation and not by its stubs.
        return grpc.dynamic_ssl_server_credentials(self._configuration(ask=ask), newer, ask)  # type: ignore[arg-type]

    def pair(self) -> tuple[bytes, bytes]:
        """Returns the certificate, with those above it, and its key, as PEM."""
        return certificates.to_pem(*self._chain), keys.to_pem(self._key)

    def changed(self) -> bool:
        """Returns whether a file was replaced since the files were read last, or could not be."""
        return self._seen != self.files.stamps()

    def refresh(self) -> bool:
        """Renews the certificate if it is time and the authority is here, else takes up what the files have by now.

        Returns:
            True if there is another one, or other authorities.

        Raises:
            IdentityInvalid: If what the files have cannot be used; what was served goes on being served.
            StateInvalid: If a new one cannot be written.
        """
        before, serving = self._version, self.authorities.serving
        if serving and certificates.is_due(self.certificate, datetime.now(UTC)):
            issue_server(self.files, serving, self.hosts, self._key)
        self._read()
        return self._version != before

    def faults(self, now: datetime) -> Iterator[str]:
        """Yields why nobody takes these certificates at a time, a sentence each: they have ended or not begun."""
        for whose, one in (("the server's certificate", self.certificate), ("its authority", self.root)):
            begin, end = one.not_valid_before_utc, one.not_valid_after_utc
            here = f"and the clock here says {now:{_MOMENT}}"
            if now < begin:
                yield (
                    f"{whose} begins at {begin:{_MOMENT}}, {here}: it is behind, or was ahead when that was made; set "
                    "it (timedatectl)"
                )
            elif now > end:
                yield (
                    f"{whose} ended at {end:{_MOMENT}}, {here}: make another (fedpeft-server init), or set the clock "
                    "if it is that"
                )

    def _read(self) -> None:
        self._seen = self.files.stamps()  # before reading: what is written meanwhile counts as a change
        key, chain = keys.load(self.files.server_key), certificates.load(self.files.server)
        if chain[0].public_key() != key.public_key():
            raise IdentityInvalid(f"{self.files.server} is not the certificate of {self.files.server_key}")
        if not certificates.hosts_of(chain[0]):
            raise IdentityInvalid(f"{self.files.server} names no host among its subject alternative names")
        authorities = Authorities.read(self.files)
        trusted = authorities.trusted
        changed = getattr(self, "_served", None) != (chain, trusted)
        self._served = chain, trusted
        self.authorities = authorities
        self.trusted = frozenset(map(certificates.fingerprint, trusted))
        self._key: PrivateKey = key
        self._chain: list[x509.Certificate] = chain
        self._version = getattr(self, "_version", 0) + changed

    def _configuration(self, *, ask: bool) -> grpc.ServerCertificateConfiguration:
        trusted = certificates.to_pem(*self.authorities.trusted)
        pair = (keys.to_pem(self._key), certificates.to_pem(*self._chain))
        return grpc.ssl_server_certificate_configuration([pair], trusted if ask else None)


def read_authority(files: Files) -> Authority | None:
    """Returns the authority that signs the server's certificate, None if its key is not in the folder.

    Raises:
        IdentityInvalid: If it cannot be used.
    """
    if not (files.authority_key.exists() and files.authority.exists()):
        return None
    return Authorities.read(files).serving


def issue_server(files: Files, authority: Authority, hosts: Sequence[str], key: PrivateKey) -> x509.Certificate:
    """Writes a certificate for the server and returns it.

    Raises:
        IdentityInvalid: If a host is neither a name nor an address.
        StateInvalid: If it cannot be written.
    """
    certificate = authority.issue_server(hosts, key.public_key(), SERVER_LIFE)
    with durable.refusals(f"writing {files.server}"):
        durable.write(files.server, certificates.to_pem(certificate))
    return certificate
